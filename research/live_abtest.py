"""Customers whom neither of two models has seen: what the models say of them, and an A/B test of a running server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import requests
from sklearn.ensemble import RandomForestClassifier

import evaluation
import train
from apps.ml.artifacts import ArtifactError, TrainingRun, open_run
from apps.ml.schema import outcomes, rows_of, spelled

TIMEOUT_SECONDS = 60
UNTUNED = "forest at its defaults"


class Refused(Exception):
    """What cannot be done; the message is a sentence, the server's own where it gave one."""


@dataclass(frozen=True)
class HeldOut:
    """A customer whom neither model was trained on. outcome: as the table spells it."""

    row: dict[str, Any]
    outcome: str


class Api:
    """The calls that a test needs. token: where the server asks for one. Every call may raise Refused."""

    def __init__(self, url: str, token: str | None = None):
        self.url = url.rstrip("/")
        self._session = requests.Session()
        if token:
            self._session.headers["Authorization"] = f"Token {token}"

    def algorithms(self, endpoint: str) -> list[dict[str, Any]]:
        return self._call("GET", "mlalgorithms", params={"endpoint": endpoint})

    def algorithm(self, algorithm_id: int) -> dict[str, Any]:
        return self._call("GET", f"mlalgorithms/{algorithm_id}")

    def set_status(self, algorithm_id: int, status: str, by: str) -> dict[str, Any]:
        body = {"parent_mlalgorithm": algorithm_id, "status": status, "created_by": by}
        return self._call("POST", "mlalgorithmstatuses", json=body)

    def start_test(self, title: str, first: int, second: int, by: str, **plan: Any) -> dict[str, Any]:
        """plan: `policy`, `design`, `horizon` and what else a test is told when it starts."""
        body = {"title": title, "parent_mlalgorithm_1": first, "parent_mlalgorithm_2": second, "created_by": by, **plan}
        return self._call("POST", "abtests", json=body)

    def report(self, test_id: int) -> dict[str, Any]:
        return self._call("GET", f"abtests/{test_id}/report")

    def stop_test(self, test_id: int) -> dict[str, Any]:
        return self._call("POST", f"stop_ab_test/{test_id}")

    def predict(self, endpoint: str, row: Mapping[str, Any], status: str) -> dict[str, Any]:
        return self._call("POST", f"{endpoint}/predict", params={"status": status}, json=dict(row))

    def tell(self, outcomes: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """Send what really happened: (id of the request, outcome) of each; returns how many were recorded."""
        body = [{"request_id": request_id, "outcome": outcome} for request_id, outcome in outcomes]
        return self._call("POST", "feedback", json=body)

    def replay(self, champion: int, challenger: int, since: str) -> dict[str, Any]:
        """Let the challenger score what the champion has answered since a moment, and compare."""
        body = {"champion": champion, "challenger": challenger, "since": since}
        return self._call("POST", "abtests/replay", json=body)

    def plan(self, baseline: float, lift: float, disagreement: float) -> dict[str, Any]:
        """What it takes to show a lift; shares in (0, 1)."""
        params = {"baseline": baseline, "lift": lift, "disagreement": disagreement}
        return self._call("GET", "abtests/plan", params=params)

    def _call(self, method: str, path: str, **kwargs: Any) -> Any:
        try:
            reply = self._session.request(method, f"{self.url}/api/v1/{path}", timeout=TIMEOUT_SECONDS, **kwargs)
        except requests.RequestException as error:
            raise Refused(
                f"No server answers at {self.url} ({type(error).__name__}): start one, or name yours."
            ) from None
        try:
            body = reply.json()
        except ValueError:
            raise Refused(f"{self.url} answered {reply.status_code} and no JSON: is it the retention server?") from None
        if not reply.ok:
            raise Refused(body.get("message", f"{method} {path} was answered with {reply.status_code}."))
        return body


def contestants(
    algorithms: Sequence[Mapping[str, Any]], challenger: int | None = None
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The algorithm in production and the one to test it against, by default the newest in staging or testing.

    challenger: an algorithm's id. Raises Refused.
    """
    champion = next((one for one in algorithms if one["current_status"] == "production"), None)
    if champion is None:
        raise Refused("No algorithm is in production: promote one first, or stop the A/B test that is running.")
    if challenger is not None:
        chosen = [one for one in algorithms if one["id"] == challenger]
    else:
        waiting = {
            status: [a for a in algorithms if a["current_status"] == status] for status in ("staging", "testing")
        }
        chosen = sorted(waiting["staging"] or waiting["testing"], key=lambda one: one["id"])
    if not chosen:
        raise Refused("There is no algorithm to test against: give one the status staging.")
    return champion, chosen[-1]


def held_out(
    arms: Sequence[Mapping[str, Any]], directory: Path | str, data: Path | str, *, seed: int = train.SEED
) -> list[HeldOut]:
    """The customers of a file, in random order, whom no arm's model was trained on. Raises Refused.

    Target, identifier and columns are those of the arms' training runs.
    """
    with _artifacts_are_the_servers():
        runs = [open_run(Path(directory), version) for version in dict.fromkeys(arm["version"] for arm in arms)]
        seen = frozenset().union(*(run.training_customers for run in runs))
    schema = runs[0].schema
    if not all(run.schema.identifier for run in runs):
        raise Refused("The training table names no customer, so nobody knows which customers are held out.")
    if any(set(run.schema.names) != set(schema.names) for run in runs):
        raise Refused("The two models were trained on different columns; one row cannot serve both.")
    table = _table(runs[0], data)
    frame = table.frame[~_keys(table).isin(seen)].sample(frac=1, random_state=seed)
    if frame.empty:
        raise Refused(f"Every customer of {table.filename} was trained on; name a file with others.")
    rows = rows_of(frame[[schema.identifier, *schema.names]])
    return [HeldOut(row, spelled(outcome)) for row, outcome in zip(rows, frame[schema.target.name], strict=True)]


def right_answers(arm: Mapping[str, Any], directory: Path | str, customers: Sequence[HeldOut]) -> np.ndarray:
    """Whose outcome an arm's model has right, (customers,) bool; the server is not asked. Raises Refused."""
    with _artifacts_are_the_servers():
        run = open_run(Path(directory), arm["version"])
        model = run.load_model(f"{arm['key']}.joblib")
    return _is_right(model, run, customers)


def right_answers_untuned(
    arm: Mapping[str, Any],
    directory: Path | str,
    data: Path | str,
    customers: Sequence[HeldOut],
    *,
    seed: int = train.SEED,
) -> np.ndarray:
    """The same of a weaker model: a forest as scikit-learn makes it, whose trees grow until they know each customer.

    It learns from those customers of the file from whom the arm's model learned. Raises Refused.
    """
    with _artifacts_are_the_servers():
        run = open_run(Path(directory), arm["version"])
        seen = run.training_customers
    table = _table(run, data)
    frame = table.frame[_keys(table).isin(seen)]
    outcome = outcomes(frame, run.schema.target)
    if len(np.unique(outcome)) < 2:
        raise Refused(f"{table.filename} lacks the customers of training run {run.version}; name the file with them.")
    forest = RandomForestClassifier(random_state=seed, n_jobs=-1)
    forest.fit(run.schema.align_table(frame[list(run.schema.names)]).matrix, outcome)
    return _is_right(forest, run, customers)


@contextmanager
def _artifacts_are_the_servers() -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise Refused(f"{error} Set ML_ARTIFACTS_DIR to the folder that the server uses.") from None


def _table(run: TrainingRun, data: Path | str) -> train.Table:
    schema = run.schema
    return train.load_table(data, schema.target.name, schema.target.positive, schema.identifier, schema.dropped)


def _keys(table: train.Table) -> pd.Series:
    return table.frame[table.schema.identifier].str.strip()


def _is_right(model: Any, run: TrainingRun, customers: Sequence[HeldOut]) -> np.ndarray:
    matrix = run.schema.align([customer.row for customer in customers]).matrix
    stayed = np.array([customer.outcome == run.schema.target.positive for customer in customers])
    return (model.predict_proba(matrix)[:, 1] > evaluation.THRESHOLD) == stayed


def named(arm: Mapping[str, Any]) -> str:
    return f"{arm['name']} {arm['version']}"


def in_steps(items: Sequence[Any], step: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + step] for start in range(0, len(items), step))


def planned(api: Api, weaker: np.ndarray, better: np.ndarray) -> str:
    """How many customers the server expects a test of two models to need, or why it cannot say.

    weaker, better: (customers,) bool, whose outcome each has right, of the same customers.
    """
    lift = better.mean() - weaker.mean()
    try:
        return api.plan(weaker.mean(), lift, (weaker != better).mean())["message"]
    except Refused as refusal:
        return str(refusal)


def standing(report: Mapping[str, Any]) -> pd.DataFrame:
    """How a test stands, one line per arm: customers, labelled ones, accuracy and its interval."""
    lines = []
    for side in ("champion", "challenger"):
        arm = report[side]
        shown = ["", ""]
        if arm["accuracy"] is not None:
            low, high = arm["accuracy_interval"]
            shown = [f"{arm['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"]
        lines.append([side, arm["name"], arm["customers"], arm["labelled"], *shown])
    header = ["", "algorithm", "customers", "labelled", "accuracy", "interval"]
    return pd.DataFrame(lines, columns=header).set_index("")


def looks(reports: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of those reports in which both arms have labels: labelled customers, the difference and its interval.

    (looks,), (looks,) and (looks, 2).
    """
    told = [one for one in reports if one["difference"]["interval"]]
    labelled = [one["champion"]["labelled"] + one["challenger"]["labelled"] for one in told]
    differences = [one["difference"] for one in told]
    return (
        np.array(labelled, int),
        np.array([one["estimate"] for one in differences], float),
        np.array([one["interval"] for one in differences], float).reshape(-1, 2),
    )


def turns(reports: Sequence[Mapping[str, Any]]) -> str:
    """What the server said whenever its verdict became another one, as a list."""
    lines, verdict = [], None
    for report in reports:
        decision = report["decision"]
        if decision["verdict"] != verdict:
            verdict = decision["verdict"]
            lines.append(f"- `{verdict}`: {decision['sentence']}")
    return "\n".join(lines)


def on_the_accuracy_rule(report: Mapping[str, Any]) -> str:
    """Whom a test would promote that asks for no evidence."""
    champion, challenger = report["champion"], report["challenger"]
    lead = report["difference"]["estimate"]
    if not lead:
        return "Neither is ahead, so the policy `accuracy` would have left production as it was, too."
    ahead = challenger if lead > 0 else champion
    change = "moved production to" if lead > 0 else "kept"
    return (
        f"The policy `accuracy`, which asks for no evidence, would have {change} **{ahead['name']}** for its lead of "
        f"{100 * abs(lead):.1f} points, whatever chance had to do with it."
    )


def on_the_replay(replayed: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What the server says of both on the same customers, and how wide its interval is beside the split's."""
    told = f"> {replayed['sentence']}"
    paired, split = replayed["difference"], report["difference"]["interval"]
    if not split:
        return told
    customers = report["champion"]["labelled"] + report["challenger"]["labelled"]
    return (
        f"{told}\n\nOn {replayed['compared']:,} customers its interval is "
        f"{100 * (paired['high'] - paired['low']):.1f} points wide; the split's, on {customers:,}, is "
        f"{100 * (split[1] - split[0]):.1f}."
    )


def restore(api: Api, before: Sequence[Mapping[str, Any]], by: str) -> pd.DataFrame:
    """Give algorithms back the statuses they had, the production one first; returns what was and what is."""
    for arm in sorted(before, key=lambda one: one["current_status"] != "production"):
        if api.algorithm(arm["id"])["current_status"] != arm["current_status"]:
            api.set_status(arm["id"], arm["current_status"], by)
    now = [[named(arm), arm["current_status"], api.algorithm(arm["id"])["current_status"]] for arm in before]
    return pd.DataFrame(now, columns=["algorithm", "before the test", "now"]).set_index("algorithm")
