from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandError, CommandParser
from tqdm import tqdm

from apps.endpoints.management.base import BaseCommand
from apps.endpoints.models import Endpoint, MLAlgorithm
from apps.ml.artifacts import ArtifactError
from apps.ml.registry import DEFAULT_ENDPOINT, registry


class Command(BaseCommand):
    help = "Register a training run's algorithms. Running servers answer with them from the next request on."

    def create_parser(self, *args: Any, **kwargs: Any) -> CommandParser:
        # Every command of Django has a --version of its own, to which this one's gives no room otherwise.
        return super().create_parser(*args, conflict_handler="resolve", **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--endpoint", default=DEFAULT_ENDPOINT, help="Created if there is none of this name.")
        parser.add_argument("--version", help="Of the training run; the newest unless given.")

    def handle(self, *, endpoint: str, version: str | None, **options: Any) -> None:
        try:
            Endpoint(name=endpoint).clean_fields(exclude=["owner"])
        except ValidationError:
            raise CommandError(f"{endpoint!r} is no name for an endpoint: use letters, digits, - and _.") from None
        known = set(MLAlgorithm.objects.values_list("pk", flat=True))
        try:
            registered = registry.register_run(endpoint, version)
        except ArtifactError as error:
            raise CommandError(str(error)) from None
        if not registered:
            raise CommandError("This training run holds no algorithm that apps/ml/registry.py names.")
        statuses = dict(MLAlgorithm.objects.with_current_status().values_list("pk", "current_status"))
        lines = []
        for algorithm in tqdm(registered, desc="Loading", leave=False, disable=None):
            came = "was registered already" if algorithm.pk in known else "is new"
            line = f"{endpoint}: {algorithm} {came}; its status is {statuses[algorithm.pk]}"
            try:
                registry.get(algorithm)
            except ArtifactError as error:
                line += f", but it cannot answer: {error}"
            lines.append(line)
        self.stdout.write("\n".join(lines))
