"""Outcomes: what became of a customer after the answer, and every correction of it. Told one by one, or many at once.

Who tells outcomes holds a shared lock on the endpoints of their requests; whoever ends an A/B test an exclusive one, to
write down until when it counts. So a decision counts each change that is dated before it, and none that is dated after.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from typing import Any, NamedTuple

from django.db import connection, transaction
from django.db.models import Value
from django.db.models.expressions import RawSQL
from django.db.models.functions import Coalesce

from apps.endpoints import lifecycle, outcomes, tables
from apps.endpoints.csv_file import BadLine, BadRows, BatchError, Layout
from apps.endpoints.json_text import dumps
from apps.endpoints.models import ABTest, Endpoint, MLAlgorithm, MLRequest
from apps.endpoints.outcomes import ACTED_ON, COLUMNS, CUSTOMER_KEY, FEEDBACK, OUTCOME, REQUEST_ID, BadValue, Outcome
from apps.endpoints.storage import Source
from apps.endpoints.turns import in_turn
from apps.ml.schema import MISSING_IN_FILES, InputError, Problem

# All of a file are written in one transaction, for which other writers of a SQLite file wait no longer than 20 seconds.
MOST_OUTCOMES = 200_000
CHUNK_ROWS = 10_000


class UnknownOutcome(ValueError):
    """An outcome that is neither a label nor a value of the training table's target."""


class TooManyOutcomes(BatchError):
    """More outcomes than one transaction should write."""


@dataclass(frozen=True)
class Recorded:
    """What came of some outcomes. By request: recorded are new, corrected are changed, in outcome or in acted_on.

    unchanged: lines that say what was known, or what another line says. ignored: columns that were not looked at.
    """

    lines: int
    recorded: int
    corrected: int
    unchanged: int
    ignored: Sequence[str] = ()

    @property
    def message(self) -> str:
        if self.unchanged == self.lines:
            said = "All of this was known; nothing has changed."
        else:
            said = f"Recorded {self.recorded:,}, corrected {self.corrected:,}, known before {self.unchanged:,}."
        return f"{said} Columns that were not looked at: {', '.join(self.ignored)}." if self.ignored else said


class _Meaning(NamedTuple):
    """acted_on: None leaves what is known."""

    label: str
    acted_on: bool | None


class _Gone(Exception):
    """A request was purged meanwhile."""


def record(request_id: int, outcome: Any, *, acted_on: bool | None = None, by: str, now: datetime) -> MLRequest:
    """Store the true outcome of a logged request; telling it again changes nothing.

    acted_on: whether something was done for the customer because of the answer; None leaves what is known.
    Raises UnknownOutcome, MLRequest.DoesNotExist.
    """
    algorithm = MLRequest.objects.select_related("parent_mlalgorithm").get(pk=request_id).parent_mlalgorithm
    meaning = _Meaning(_label(algorithm, outcome, FEEDBACK), acted_on)
    with transaction.atomic():
        try:
            _write({request_id: meaning}, {algorithm.parent_endpoint_id}, by=by, now=now)
        except _Gone:
            raise MLRequest.DoesNotExist(f"Request {request_id} was purged.") from None
        return MLRequest.objects.get(pk=request_id)


def record_rows(
    rows: Sequence[Any],
    *,
    endpoint: Endpoint | None = None,
    window_days: int = outcomes.DEFAULT_WINDOW_DAYS,
    by: str,
    now: datetime,
) -> Recorded:
    """Store the outcomes that rows tell, as `outcomes.read` reads them: all of them or, if any is wrong, none.

    endpoint: to which customers' requests belong. Raises InputError, TooManyOutcomes.
    """
    _check_number(len(rows))
    told: dict[int, Outcome] = {}
    problems: list[Problem] = []
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, Mapping):
                raise BadValue(None, f"Expected an object with {', '.join(COLUMNS)}.")
            told[number] = outcomes.read(row, window_days=window_days, now=now)
        except BadValue as error:
            problems.append(Problem(error.field, str(error), number))
    while True:
        meanings, endpoint_ids, unmatched = _understood(told, endpoint)
        if problems or unmatched:
            raise InputError([*problems, *unmatched])
        try:
            recorded, corrected = in_turn(partial(_write, meanings, endpoint_ids, by=by, now=now))
        except _Gone:  # so that the next look says which
            continue
        return Recorded(len(rows), recorded, corrected, len(rows) - recorded - corrected)


def record_file(source: Source, **how: Any) -> Recorded:
    """Store the outcomes that the lines of a table tell: all of them or, if any is wrong, none. how: as `record_rows`.

    Raises BatchError, BadRows.
    """
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    problems: list[BadLine] = []
    with tables.opened([source]) as table:
        columns = _columns(table.layout)
        for chunk in table.chunks(CHUNK_ROWS):
            read = chunk.rows()
            rows += [
                {name: cells[at] for name, at in columns.items() if cells[at].strip() not in MISSING_IN_FILES}
                for cells in read.cells
            ]
            lines += read.lines
            problems += read.problems
            _check_number(len(rows) + len(problems))
        ignored = [name for name in table.layout.header if name not in columns]
    if problems:
        raise BadRows(problems)
    try:
        return replace(record_rows(rows, **how), ignored=ignored)
    except InputError as error:
        raise BadRows([BadLine(lines[p.row], p.field, p.message) for p in error.problems]) from None


def _columns(layout: Layout) -> dict[str, int]:
    """Where in a line what is told of an outcome stands."""
    header = layout.header
    twice = next((name for name in COLUMNS if header.count(name) > 1), None)
    if twice:
        raise BatchError(f"The column {twice} is there twice.")
    if OUTCOME in header and FEEDBACK in header:
        raise BatchError(f"The file has the columns {OUTCOME} and {FEEDBACK}, which mean the same; leave one out.")
    if OUTCOME not in header and FEEDBACK not in header:
        raise BatchError(f"The file has no column {OUTCOME}, which says what became of the customer.")
    if REQUEST_ID not in header and CUSTOMER_KEY not in header:
        raise BatchError(f"The file has neither a column {REQUEST_ID} nor {CUSTOMER_KEY}, to say whose outcome it is.")
    return {name: header.index(name) for name in COLUMNS if name in header}


def _check_number(count: int) -> None:
    if count > MOST_OUTCOMES:
        raise TooManyOutcomes(f"These are more than {MOST_OUTCOMES:,} outcomes; send them in parts.")


# --- What is meant ----------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A request that an outcome may be of."""

    request_id: int
    algorithm_id: int
    endpoint_id: int


def _understood(
    told: Mapping[int, Outcome], endpoint: Endpoint | None
) -> tuple[dict[int, _Meaning], set[int], list[Problem]]:
    """By request what is told of it, the endpoints of these requests, and which outcomes have no such meaning."""
    found = {**_by_id(told), **_by_customer(told, endpoint)}
    algorithms = MLAlgorithm.objects.in_bulk({one.algorithm_id for several in found.values() for one in several})
    endpoint_names = dict(Endpoint.objects.values_list("pk", "name"))

    @cache
    def label(algorithm_id: int, outcome: str) -> str:
        return _label(algorithms[algorithm_id], outcome, OUTCOME)

    meanings: dict[int, _Meaning] = {}
    endpoint_ids: set[int] = set()
    problems: list[Problem] = []
    for number, outcome in told.items():
        requests = found.get(number, ())
        if len(requests) != 1:
            problems.append(_unmatched(number, outcome, sorted(endpoint_names[one.endpoint_id] for one in requests)))
            continue
        (request,) = requests
        try:
            meaning = _Meaning(label(request.algorithm_id, outcome.outcome), outcome.acted_on)
        except UnknownOutcome as error:
            problems.append(Problem(OUTCOME, str(error), number))
            continue
        known = meanings.setdefault(request.request_id, meaning)
        if known != meaning:
            field = OUTCOME if known.label != meaning.label else ACTED_ON
            sentence = f"Another {field} of request {request.request_id} was told before in what was sent."
            problems.append(Problem(field, sentence, number))
        endpoint_ids.add(request.endpoint_id)
    return meanings, endpoint_ids, problems


def _unmatched(number: int, outcome: Outcome, endpoint_names: Sequence[str]) -> Problem:
    if outcome.request_id is not None:
        return Problem(REQUEST_ID, f"There is no request {outcome.request_id}, or it was purged.", number)
    whose = f"customer {outcome.customer_key!r} from {_told(outcome.since)} until before {_told(outcome.before)}"
    if not endpoint_names:
        return Problem(CUSTOMER_KEY, f"There is no request of {whose}.", number)
    names = ", ".join(endpoint_names)
    return Problem(CUSTOMER_KEY, f"There are requests of {whose} of several endpoints; name one: {names}.", number)


def _told(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _label(algorithm: MLAlgorithm, outcome: Any, field: str) -> str:
    """Raises UnknownOutcome."""
    label = algorithm.outcome_label(outcome)
    if label is None:
        target = algorithm.target
        raise UnknownOutcome(
            f'{field} must be "1" (the customer stayed, {target["name"]} = {target["positive"]}) '
            f'or "0" (the customer left, {target["name"]} = {target["negative"]}), not {str(outcome)[:60]!r}.'
        )
    return label


def _by_id(told: Mapping[int, Outcome]) -> dict[int, list[_Found]]:
    """By outcome the request that it names, where there is one."""
    numbers = defaultdict(list)
    for number, outcome in told.items():
        if outcome.request_id is not None:
            numbers[outcome.request_id].append(number)
    found = {}
    for some in _in_chunks([*numbers]):
        requests = MLRequest.objects.filter(pk__in=_each(some))
        for row in requests.values_list("pk", "parent_mlalgorithm", "parent_mlalgorithm__parent_endpoint"):
            found.update({number: [_Found(*row)] for number in numbers[row[0]]})
    return found


# NOT (customer_key = '') is the condition of the index, which SQLite uses only where the query repeats it.
_LATEST_BY_ENDPOINT = """
    WITH told (number, customer_key, since, before) AS ({told})
    SELECT number, request_id, algorithm_id, endpoint_id FROM (
        SELECT told.number, r.id AS request_id, a.id AS algorithm_id, a.parent_endpoint_id AS endpoint_id,
            ROW_NUMBER() OVER (
                PARTITION BY told.number, a.parent_endpoint_id ORDER BY r.created_at DESC, r.id DESC
            ) AS place
        FROM told
        JOIN endpoints_mlrequest AS r ON r.customer_key = told.customer_key AND NOT (r.customer_key = '')
            AND r.created_at >= told.since AND r.created_at < told.before
        JOIN endpoints_mlalgorithm AS a ON a.id = r.parent_mlalgorithm_id
    ) AS found WHERE place = 1
"""


def _by_customer(told: Mapping[int, Outcome], endpoint: Endpoint | None) -> dict[int, list[_Found]]:
    """By outcome the latest request of its customer in its window: of each endpoint, or of the one given."""
    found = defaultdict(list)
    adapted = cache(connection.ops.adapt_datetimefield_value)
    of_customers = [
        (number, outcome.customer_key, adapted(outcome.since), adapted(outcome.before))
        for number, outcome in told.items()
        if outcome.request_id is None
    ]
    for some in _in_chunks(of_customers):
        with connection.cursor() as cursor:
            cursor.execute(*_latest_by_endpoint(some))
            for number, *request in cursor.fetchall():
                if endpoint is None or endpoint.pk == request[-1]:
                    found[number].append(_Found(*request))
    return found


def _latest_by_endpoint(told: Sequence[Sequence[Any]]) -> tuple[str, list[Any]]:
    """SQL and its parameters for the latest request of each customer told, by endpoint."""
    if connection.vendor == "sqlite":
        fields = ", ".join(f"json_extract(value, '$[{place}]')" for place in range(len(told[0])))
        return _LATEST_BY_ENDPOINT.format(told=f"SELECT {fields} FROM json_each(%s)"), [dumps(told)]
    arrays = "SELECT * FROM unnest(%s::bigint[], %s::text[], %s::timestamptz[], %s::timestamptz[])"
    return _LATEST_BY_ENDPOINT.format(told=arrays), [list(column) for column in zip(*told, strict=True)]


def _each(ids: Sequence[int]) -> RawSQL | Sequence[int]:
    """Ids as one parameter: SQLite takes few, and thousands of them cost more to write out and read than to look up."""
    if connection.vendor == "sqlite":
        return RawSQL("SELECT value FROM json_each(%s)", [dumps(ids)])
    return RawSQL("SELECT unnest(%s::bigint[])", [ids]) if connection.vendor == "postgresql" else ids


def _in_chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (values[at : at + CHUNK_ROWS] for at in range(0, len(values), CHUNK_ROWS))


# --- What is written --------------------------------------------------------------------------------------


def _write(
    meanings: Mapping[int, _Meaning], endpoint_ids: Collection[int], *, by: str, now: datetime
) -> tuple[int, int]:
    """Write what is told of requests, in one transaction; how many had no outcome, and how many another.

    endpoint_ids: of these requests. Rows are locked in the order of ids, endpoints first. Raises _Gone.
    """
    changed: dict[_Meaning, list[int]] = defaultdict(list)
    recorded = 0
    with transaction.atomic():
        lifecycle.lock_shared(endpoint_ids)
        moment = ABTest.objects.filter(parent_endpoint__in=endpoint_ids).moment_after_counts(now)
        for some in _in_chunks(sorted(meanings)):
            known = _locked(some)
            if len(known) < len(some):
                raise _Gone
            for pk, previous, acted_on in known:
                meaning = meanings[pk]
                if meaning.acted_on is None:
                    meaning = meaning._replace(acted_on=acted_on)
                if meaning != (previous, acted_on):
                    changed[meaning].append(pk)
                    recorded += previous is None
        for meaning, ids in changed.items():
            for some in _in_chunks(ids):
                _change(some, meaning, by, moment)
    return recorded, sum(map(len, changed.values())) - recorded


def _change(ids: Sequence[int], meaning: _Meaning, by: str, moment: datetime) -> None:
    """Add a row of history for each of some requests, and write what is known now."""
    requests = MLRequest.objects.filter(pk__in=_each(ids))
    these, values = requests.values("pk").query.sql_with_params()
    with connection.cursor() as cursor:  # the rows of many need not come here to be copied
        cursor.execute(
            "INSERT INTO endpoints_feedbackchange (request_id, previous, feedback, acted_on, created_by, created_at)"
            f" SELECT id, feedback, %s, %s, %s, %s FROM endpoints_mlrequest WHERE id IN ({these})",
            [*meaning, by, connection.ops.adapt_datetimefield_value(moment), *values],
        )
    requests.update(
        feedback=meaning.label, acted_on=meaning.acted_on, labelled_at=Coalesce("labelled_at", Value(moment))
    )


def _locked(ids: Sequence[int]) -> list[tuple[int, str | None, bool | None]]:
    """Of requests the id, the outcome and acted_on; nobody else changes or purges them until the transaction ends."""
    no_key = connection.features.has_select_for_no_key_update  # what only refers to them need not wait
    locked = MLRequest.objects.filter(pk__in=_each(ids)).order_by("pk").select_for_update(no_key=no_key)
    return list(locked.values_list("pk", "feedback", "acted_on"))
