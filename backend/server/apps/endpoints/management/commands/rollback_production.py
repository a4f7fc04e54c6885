from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.utils import timezone

from apps.endpoints import production
from apps.endpoints.lifecycle import LifecycleError
from apps.endpoints.management.base import BaseCommand, who
from apps.endpoints.models import Endpoint


class Command(BaseCommand):
    help = "Give an endpoint's production back to the algorithm that was promoted before, if it can answer."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("endpoint", metavar="ENDPOINT", help="Its name, such as classifier.")
        parser.add_argument("--reason", default="", help="Why; kept in the status history.")

    def handle(self, *, endpoint: str, reason: str, **options: Any) -> None:
        found = Endpoint.objects.filter(name=endpoint).first()
        if found is None:
            names = ", ".join(Endpoint.objects.order_by("id").values_list("name", flat=True)[:20]) or "none yet"
            raise CommandError(f"There is no endpoint {endpoint!r}; there are: {names}.")
        try:
            done = production.roll_back(found, by=who(), now=timezone.now(), reason=reason)
        except LifecycleError as error:
            raise CommandError(str(error)) from None
        self.stdout.write(f"{found}: {done}")
