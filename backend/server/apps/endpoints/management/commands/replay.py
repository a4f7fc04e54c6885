from __future__ import annotations

from datetime import datetime
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.utils import timezone
from django.utils.dateparse import parse_datetime
from tqdm import tqdm

from apps.endpoints import replay
from apps.endpoints.management.base import BaseCommand
from apps.endpoints.models import MOST_DAYS
from apps.endpoints.prediction import Unavailable
from apps.endpoints.replay import Replay, ReplayError


class Command(BaseCommand):
    help = (
        "Compare a challenger with the champion on logged requests whose outcome is known, before any traffic moves. "
        "Nothing is recorded."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("challenger", type=int, metavar="ID", help="The algorithm's id, as /api/v1/mlalgorithms.")
        parser.add_argument(
            "--champion", type=int, metavar="ID", help="By default in production, or the running test's champion."
        )
        parser.add_argument("--since", metavar="DATE", help="2026-01-31, or 2026-01-31T12:00, in the TIME_ZONE set.")
        parser.add_argument("--until", metavar="DATE", help="Before when the champion answered.")
        parser.add_argument("--alpha", type=float, default=0.05, help="By default %(default)s.")
        parser.add_argument("--minimum-labelled", type=int, default=100, help="By default %(default)s customers.")
        parser.add_argument("--maturity-days", type=int, help="How old an answer must be; by default the endpoint's.")
        parser.add_argument("--most", type=int, help="Labelled requests, the newest first; by default all.")

    def handle(
        self,
        *,
        challenger: int,
        champion: int | None,
        since: str | None,
        until: str | None,
        alpha: float,
        minimum_labelled: int,
        maturity_days: int | None,
        most: int | None,
        **options: Any,
    ) -> None:
        if not 1e-6 <= alpha <= 0.5:
            raise CommandError(f"--alpha must be from 0.000001 to 0.5, not {alpha}.")
        if minimum_labelled < 1 or (most is not None and most < 1):
            raise CommandError("--minimum-labelled and --most must be 1 or more.")
        if maturity_days is not None and not 0 <= maturity_days <= MOST_DAYS:
            raise CommandError(f"--maturity-days must be from 0 to {MOST_DAYS:,}, not {maturity_days}.")
        with tqdm(unit=" customers", unit_scale=True, disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            try:
                replayed = replay.replay(
                    challenger,
                    champion,
                    now=timezone.now(),
                    since=_moment("--since", since),
                    until=_moment("--until", until),
                    alpha=alpha,
                    minimum_labelled=minimum_labelled,
                    maturity_days=maturity_days,
                    most=most,
                    progress=progress,
                )
            except (ReplayError, Unavailable) as error:
                raise CommandError(str(error)) from None
        self.stdout.write("\n".join(_lines(replayed)))


def _lines(replayed: Replay) -> list[str]:
    told, left_out = replayed.as_json(), replayed.left_out
    pairs, difference = replayed.pairs, told["difference"]
    shown = "{0}: {accuracy:.1%} right ({low:.1%} to {high:.1%})"
    return [
        f"{replayed.considered:,} labelled requests of {replayed.champion}, left out: {left_out.immature:,} too young, "
        f"{left_out.trained_on:,} that {replayed.challenger} may have been trained on (known by "
        f"{told['training']['known_by']}), {left_out.repeated:,} of customers who count already, {left_out.failures:,} "
        "that it could not score.",
        f"Of {pairs.total:,} customers both were right about {pairs.both:,}, only the champion about "
        f"{pairs.only_champion:,}, only the challenger about {pairs.only_challenger:,}, neither about "
        f"{pairs.neither:,}.",
        shown.format(replayed.champion, **told["champion"]),
        shown.format(replayed.challenger, **told["challenger"]),
        f"Difference {100 * difference['estimate']:+.1f} points ({100 * difference['low']:+.1f} to "
        f"{100 * difference['high']:+.1f}), p = {told['p']:.2g}, both anytime-valid.",
        f"{told['verdict']}: {told['sentence']}",
    ]


def _moment(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = parse_datetime(text) or datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(f"{option} must be a date such as 2026-01-31 or 2026-01-31T12:00, not {text!r}.") from None
    return moment if moment.tzinfo else timezone.make_aware(moment)
