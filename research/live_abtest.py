"""What `ab_test.ipynb` does: customers whom neither model has seen, sent to a running server, and their outcomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import requests

import evaluation
import train
from apps.ml.artifacts import ArtifactError, open_run
from apps.ml.schema import rows_of, spelled

TIMEOUT_SECONDS = 60
# 95% confidence and 80% power: the customary (1.96 + 0.84) squared.
CONFIDENCE_AND_POWER = 7.85


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

    def start_test(self, title: str, first: int, second: int, by: str) -> dict[str, Any]:
        body = {"title": title, "parent_mlalgorithm_1": first, "parent_mlalgorithm_2": second, "created_by": by}
        return self._call("POST", "abtests", json=body)

    def stop_test(self, test_id: int) -> dict[str, Any]:
        return self._call("POST", f"stop_ab_test/{test_id}")

    def predict(self, endpoint: str, row: Mapping[str, Any], status: str) -> dict[str, Any]:
        return self._call("POST", f"{endpoint}/predict", params={"status": status}, json=dict(row))

    def tell(self, request_id: int, outcome: str) -> dict[str, Any]:
        """Send the true outcome of a request; returns the request as it is logged now."""
        return self._call("PATCH", f"mlrequests/{request_id}", json={"feedback": outcome})

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
    arms: Sequence[Mapping[str, Any]], directory: Path | str, data: Path | str, *, most: int, seed: int = train.SEED
) -> list[HeldOut]:
    """At most that many customers of a file, in random order, whom no arm's model was trained on. Raises Refused.

    Target, identifier and columns are those of the arms' training runs.
    """
    try:
        runs = [open_run(Path(directory), version) for version in dict.fromkeys(arm["version"] for arm in arms)]
        schema = runs[0].schema
        seen = frozenset().union(*(run.training_customers for run in runs))
    except ArtifactError as error:
        raise Refused(f"{error} Set ML_ARTIFACTS_DIR to the folder that the server uses.") from None
    if not all(run.schema.identifier for run in runs):
        raise Refused("The training table names no customer, so nobody knows which customers are held out.")
    if any(set(run.schema.names) != set(schema.names) for run in runs):
        raise Refused("The two models were trained on different columns; one row cannot serve both.")
    target = schema.target
    table = train.load_table(data, target.name, target.positive, schema.identifier, schema.dropped)
    frame = table.frame[~table.frame[schema.identifier].str.strip().isin(seen)]
    if frame.empty:
        raise Refused(f"Every customer of {table.filename} was trained on; name a file with others.")
    frame = frame.sample(min(most, len(frame)), random_state=seed)
    rows = rows_of(frame[[schema.identifier, *schema.names]])
    return [HeldOut(row, spelled(outcome)) for row, outcome in zip(rows, frame[target.name], strict=True)]


def named(arm: Mapping[str, Any]) -> str:
    return f"{arm['name']} {arm['version']}"


def in_steps(items: Sequence[Any], step: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + step] for start in range(0, len(items), step))


def right_by_arm(labelled: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Which answers of each arm were right, {arm: (its labelled requests,) bool}, in the order given.

    labelled: requests as `Api.tell` returns them.
    """
    return {
        named(arm): np.array(
            [one["response"] == one["feedback"] for one in labelled if one["parent_mlalgorithm"] == arm["id"]], bool
        )
        for arm in arms
    }


def accuracy_table(right: Mapping[str, np.ndarray]) -> pd.DataFrame:
    lines = []
    for name, answers in right.items():
        low, high = evaluation.wilson_interval(answers.sum(), max(len(answers), 1))
        shown = [f"{answers.mean():.1%}", f"{low:.1%} to {high:.1%}"] if len(answers) else ["", ""]
        lines.append([name, len(answers), int(answers.sum()), *shown])
    return pd.DataFrame(lines, columns=["arm", "labelled", "right", "accuracy", "95% interval"]).set_index("arm")


def difference_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """95% interval of the difference of two independent shares of True. Newcombe 1998, method 10."""
    share = np.array([first.mean(), second.mean()])
    low, high = evaluation.wilson_interval(np.array([first.sum(), second.sum()]), np.array([len(first), len(second)]))
    gap = share[0] - share[1]
    below = np.hypot(share[0] - low[0], high[1] - share[1])
    above = np.hypot(high[0] - share[0], share[1] - low[1])
    return float(gap - below), float(gap + above)


def labels_needed(first: np.ndarray, second: np.ndarray, gap: float) -> int:
    """Labelled requests per arm that show a gap in accuracy, four times out of five, between arms about as good."""
    # Two right and two wrong answers are added, so that a few answers that all are right do not promise certainty.
    shares = [(answers.sum() + 2) / (len(answers) + 4) for answers in (first, second)]
    return int(np.ceil(CONFIDENCE_AND_POWER * sum(share * (1 - share) for share in shares) / gap**2))


def reading(right: Mapping[str, np.ndarray]) -> str:
    """What the labels say of the two arms, and what the accuracy rule makes of it."""
    (first, answers), (second, others) = right.items()
    if not len(answers) or not len(others):
        return "One of the arms has no labelled request, so there is nothing to compare."
    gap = answers.mean() - others.mean()
    low, high = difference_interval(answers, others)
    if not low <= 0 <= high:
        verdict = (
            f"The interval leaves out zero: these labels favour **{first if gap > 0 else second}**, unless the test "
            "was stopped at the moment when it looked good, which makes such a finding far likelier by chance."
        )
    elif gap:
        verdict = (
            "The interval holds zero: **these labels do not show that either is better.** The rule of the server "
            "promotes the more accurate all the same, however small the difference; a repetition may well promote the "
            "other."
        )
    else:
        verdict = "Both are equally accurate, so the server leaves production as it was."
    return (
        f"Accuracy of {first} less accuracy of {second}: {100 * gap:+.1f} points, 95% interval {100 * low:+.1f} to "
        f"{100 * high:+.1f}. {verdict} To see a difference of one point reliably takes about "
        f"{labels_needed(answers, others, 0.01):,} labelled requests per arm."
    )


def restore(api: Api, before: Sequence[Mapping[str, Any]], by: str) -> pd.DataFrame:
    """Give algorithms back the statuses they had, the production one first; returns what was and what is."""
    for arm in sorted(before, key=lambda one: one["current_status"] != "production"):
        if api.algorithm(arm["id"])["current_status"] != arm["current_status"]:
            api.set_status(arm["id"], arm["current_status"], by)
    now = [[named(arm), arm["current_status"], api.algorithm(arm["id"])["current_status"]] for arm in before]
    return pd.DataFrame(now, columns=["algorithm", "before the test", "now"]).set_index("algorithm")
