"""An outcome as a client tells it, in JSON or in a line of a file: whose it is, and what became of the customer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Any, NamedTuple

from django.utils import timezone
from django.utils.dateparse import parse_datetime

from apps.ml.schema import checked_key, spelled

REQUEST_ID, CUSTOMER_KEY, OUTCOME, FEEDBACK = "request_id", "customer_key", "outcome", "feedback"
OUTCOME_AT, WINDOW_DAYS, ACTED_ON = "outcome_at", "window_days", "acted_on"
COLUMNS = (REQUEST_ID, CUSTOMER_KEY, OUTCOME_AT, WINDOW_DAYS, OUTCOME, FEEDBACK, ACTED_ON)

DEFAULT_WINDOW_DAYS = 90
MOST_WINDOW_DAYS = 10_000
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)

_YES, _NO = {"true", "yes", "1"}, {"false", "no", "0"}
_LONGEST_SHOWN = 60


class BadValue(ValueError):
    """What is wrong with an outcome; `field` says where, None when that is no single field."""

    def __init__(self, field: str | None, message: str):
        self.field = field
        super().__init__(message)


class Outcome(NamedTuple):
    """What became of a customer, as it is spelled, and whether something was done for them; None when not told.

    request_id: None when it is the latest request of `customer_key` with since <= created_at < before.
    """

    request_id: int | None
    customer_key: str
    since: datetime
    before: datetime
    outcome: str
    acted_on: bool | None


def read(row: Mapping[str, Any], *, window_days: int, now: datetime) -> Outcome:
    """The outcome that a row tells, whose keys are of COLUMNS; its values may be text, and None or blank is not told.

    window_days, now: what stands for window_days and outcome_at where a row has none. Raises BadValue.
    """
    told = {name: value for name, value in row.items() if value is not None and not _is_blank(value)}
    unknown = next((name for name in told if name not in COLUMNS), None)
    if unknown is not None:
        raise BadValue(str(unknown), f"{_shown(unknown)} is no field of an outcome; there are {', '.join(COLUMNS)}.")
    if (REQUEST_ID in told) == (CUSTOMER_KEY in told):
        how_many = "not both" if REQUEST_ID in told else "one of them"
        raise BadValue(REQUEST_ID, f"Say whose outcome it is by {REQUEST_ID} or {CUSTOMER_KEY}, {how_many}.")
    before = _moment(told[OUTCOME_AT]) if OUTCOME_AT in told else now
    days = read_window_days(told[WINDOW_DAYS]) if WINDOW_DAYS in told else window_days
    return Outcome(
        request_id=_request_id(told[REQUEST_ID]) if REQUEST_ID in told else None,
        customer_key=_customer_key(told[CUSTOMER_KEY]) if CUSTOMER_KEY in told else "",
        since=before - timedelta(days=days),
        before=before,
        outcome=_outcome(told),
        acted_on=read_acted_on(told.get(ACTED_ON)),
    )


def read_acted_on(value: Any) -> bool | None:
    """True, False, or None when nothing is said. Raises BadValue."""
    if value is None or _is_blank(value):
        return None
    text = _plain(value).lower()
    if text in _YES or text in _NO:
        return text in _YES
    raise BadValue(ACTED_ON, f"{ACTED_ON} must be true or false, yes or no, 1 or 0, or empty, not {_shown(value)}.")


def read_window_days(value: Any) -> int:
    """Raises BadValue."""
    text = _plain(value)
    if re.fullmatch("[0-9]{1,6}", text) and 1 <= int(text) <= MOST_WINDOW_DAYS:
        return int(text)
    raise BadValue(
        WINDOW_DAYS, f"{WINDOW_DAYS} must be a whole number from 1 to {MOST_WINDOW_DAYS:,}, not {_shown(value)}."
    )


def _request_id(value: Any) -> int:
    text = _plain(value)
    if re.fullmatch("[0-9]{1,18}", text):
        return int(text)
    raise BadValue(REQUEST_ID, f"{REQUEST_ID} must be the number of a logged request, not {_shown(value)}.")


def _customer_key(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadValue(CUSTOMER_KEY, f"{CUSTOMER_KEY} must be text or a number, not {_shown(value)}.")
    try:
        return checked_key(value if isinstance(value, str) else spelled(value), CUSTOMER_KEY)
    except ValueError as error:
        raise BadValue(CUSTOMER_KEY, f"{error}.") from None


def _outcome(told: Mapping[str, Any]) -> str:
    if (OUTCOME in told) == (FEEDBACK in told):
        problem = "not by both" if OUTCOME in told else "which is missing"
        raise BadValue(OUTCOME, f"Say what became of the customer by {OUTCOME} (or {FEEDBACK}), {problem}.")
    name = OUTCOME if OUTCOME in told else FEEDBACK
    value = told[name]
    if not isinstance(value, (str, int, float)):
        raise BadValue(name, f'{name} must be "1" or "0", or a value of the target column, not {_shown(value)}.')
    return _plain(value)


def _moment(value: Any) -> datetime:
    zone = timezone.get_default_timezone()
    moment = _parsed(value, zone) if isinstance(value, str) and len(value) <= _LONGEST_SHOWN else None
    if moment is None or moment < EARLIEST:
        as_text = "a date, as 2026-01-31, or a date and time, as 2026-01-31T08:00:00Z"
        raise BadValue(OUTCOME_AT, f"{OUTCOME_AT} must be {as_text}, not {_shown(value)}.")
    return moment


@lru_cache(maxsize=10_000)
def _parsed(text: str, zone: tzinfo) -> datetime | None:
    """In UTC; of a plain date its first moment. zone: what is meant where the text says none."""
    try:
        moment = parse_datetime(text.strip())
        return moment and (moment.replace(tzinfo=zone) if moment.tzinfo is None else moment).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _plain(value: Any) -> str:
    """A value as text. In a file a whole number may be written as a fraction: 12.0 for 12."""
    try:
        text = (value if isinstance(value, str) else spelled(value)).strip()
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text[:-2] if text.endswith(".0") and text[:-2].isdecimal() else text


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else _plain(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
