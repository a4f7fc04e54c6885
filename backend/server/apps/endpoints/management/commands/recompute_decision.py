from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser

from apps.endpoints import abtests
from apps.endpoints.management.base import BaseCommand
from apps.endpoints.models import Decision


class Command(BaseCommand):
    help = "Make the decision of a stopped A/B test again, from the log as it stood, and compare it with the record."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("abtest", type=int, metavar="ID", help="Of the test, as /api/v1/abtests lists it.")

    def handle(self, *, abtest: int, **options: Any) -> None:
        decision = Decision.objects.select_related("abtest").filter(abtest=abtest).first()
        if decision is None:
            raise CommandError(
                f"A/B test {abtest} has no decision: it runs, ended before decisions were kept, or is none."
            )
        differs = abtests.recompute(decision)
        if differs:
            lines = [f"{name}: recorded {recorded}, now {now}" for name, (recorded, now) in differs.items()]
            raise CommandError("\n".join([f"The decision on A/B test {abtest} differs:", *lines]))
        self.stdout.write(f"The same as recorded: {decision.verdict}. {decision.sentence}")
