from __future__ import annotations

import sys
from datetime import datetime, time
from typing import Any

import structlog
from django.core.management.base import CommandError, CommandParser
from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime
from tqdm import tqdm

from apps.endpoints import purge
from apps.endpoints.management.base import BaseCommand, who

log = structlog.get_logger("purge")


class Command(BaseCommand):
    help = "Delete logged requests and their outcomes for good: those before a moment, those of a customer, or both."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--before", metavar="DATE", help="2026-01-31, or 2026-01-31T12:00, in the TIME_ZONE set.")
        parser.add_argument("--customer", metavar="KEY", help="The customer's identifier as it was sent.")
        parser.add_argument("--dry-run", action="store_true", help="Only say how many there are.")
        parser.add_argument("--no-input", action="store_true", help="Do not ask for confirmation.")

    def handle(
        self, *, before: str | None, customer: str | None, dry_run: bool, no_input: bool, **options: Any
    ) -> None:
        if before is None and customer is None:
            raise CommandError("Say which requests: --before DATE, --customer KEY, or both.")
        if customer is not None and not customer.strip():
            raise CommandError("--customer is empty; give the customer's identifier.")
        moment = _moment(before) if before is not None else None
        requests = purge.selected(before=moment, customer=customer and customer.strip())
        self._look_at_tests(requests, by_customer=customer is not None)
        found = requests.count()
        which = " ".join(
            [*([f"before {moment.isoformat()}"] if moment else []), *(["of this customer"] if customer else [])]
        )
        self.stdout.write(f"{found:,} requests {which}, {requests.labelled().count():,} of them with an outcome.")
        if dry_run or not found:
            self.stdout.write("Nothing was deleted.")
        elif no_input or self._confirmed():
            self._purge(requests, found, before=moment, by_customer=customer is not None)

    def _look_at_tests(self, requests: Any, *, by_customer: bool) -> None:
        """A test decides by its labelled requests: clearing up can wait for that, a customer's right to go cannot."""
        for test in purge.running_tests_of(requests):
            about = f"A/B test {test.pk} ({test.title}) is running and counts some of these requests"
            if not by_customer:
                raise CommandError(f"{about}. Stop it first, or choose a date before {test.created_at.isoformat()}.")
            self.stderr.write(f"{about}; it will decide without them.")

    def _confirmed(self) -> bool:
        if not sys.stdin.isatty():
            raise CommandError("Nobody can confirm this without a terminal; say --no-input to delete all the same.")
        confirmed = input("They are deleted for good. Type yes to go on: ") == "yes"
        if not confirmed:
            self.stdout.write("Nothing was deleted.")
        return confirmed

    def _purge(self, requests: Any, found: int, *, before: datetime | None, by_customer: bool) -> None:
        deleted = changes = 0
        try:
            with tqdm(total=found, unit=" requests", disable=None) as progress:
                for chunk in purge.purge(requests):
                    deleted += chunk.requests
                    changes += chunk.feedback_changes
                    progress.update(chunk.requests)
        finally:
            log.info(
                "requests purged",
                by=who(),
                requests=deleted,
                feedback_changes=changes,
                before=before and before.isoformat(),
                of_one_customer=by_customer,
            )
        self.stdout.write(f"{deleted:,} requests were deleted.")


def _moment(text: str) -> datetime:
    """A day begins, and a time without offset is meant, in the time zone of the settings."""
    try:
        day = parse_date(text)
        moment = datetime.combine(day, time.min) if day else parse_datetime(text)
    except ValueError:
        moment = None
    if moment is None:
        raise CommandError(
            f"--before must be a date such as 2026-01-31 or a time such as 2026-01-31T12:00, not {text!r}."
        )
    # Nothing is purged that is logged from now on.
    return min(moment if timezone.is_aware(moment) else timezone.make_aware(moment), timezone.now())
