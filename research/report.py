"""The tables of the training notebook, and the sentences under its figures.

The sentences are made from the numbers, so that they stay true of another team's table. Those that take
`probabilities` ({model: (n,) float}) and `outcome` ((n,) 0 or 1) speak of held-out customers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import evaluation
import train
from apps.ml.artifacts import TrainingRun
from apps.ml.schema import CATEGORICAL, NUMERIC, outcomes

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]

BETTER = {"brier": "lower", "log_loss": "lower", "expected_calibration_error": "lower"}
# Above this, one column alone nearly gives the answer away.
SUSPICIOUS_AUC = 0.95
# A bin of fewer customers says little about calibration, so it is not named.
FEWEST_IN_BIN = 30
# What shuffling costs grows with rows times columns; more of either takes time and changes little.
MOST_CELLS = 100_000
FEWEST_SHUFFLED = 1000
SHUFFLES = 5


@dataclass(frozen=True)
class Rule:
    """Customers sorted by one column, without any model.

    train_auc: of the rule where it was chosen. score: (n,) of the held-out customers, higher is likelier to stay.
    """

    column: str
    highest_first: bool
    train_auc: float
    score: np.ndarray

    def __str__(self) -> str:
        return f"`{self.column}` alone ({'highest' if self.highest_first else 'lowest'} first)"


def best_rule(parts: train.Split) -> Rule | None:
    """The one column that sorts the training rows best; None where every column is a category."""
    rules = []
    for position, column in enumerate(parts.schema.columns):
        if column.kind == CATEGORICAL:
            continue
        auc = evaluation.roc_auc(parts.train_matrix[:, position], parts.train_outcome)
        sign = 1 if auc >= 0.5 else -1
        rules.append(Rule(column.name, auc >= 0.5, max(auc, 1 - auc), sign * parts.test_matrix[:, position]))
    return max(rules, key=lambda rule: rule.train_auc, default=None)


def shuffled_importance(
    fitted: Mapping[str, train.Fitted], parts: train.Split, seed: int = train.SEED
) -> dict[str, np.ndarray]:
    """How much ROC AUC falls on held-out customers when one column is shuffled, {model: (features, SHUFFLES)}.

    On about MOST_CELLS values, and FEWEST_SHUFFLED customers at least. Breiman 2001; a column whose news another
    column also brings falls by little.
    """
    random = np.random.default_rng(seed)
    most = max(FEWEST_SHUFFLED, MOST_CELLS // len(parts.schema.columns))
    rows = np.sort(random.permutation(len(parts.test_outcome))[:most])
    outcome = parts.test_outcome[rows]
    # All shuffles of a column are scored in one call: a forest's calls cost more than its rows.
    matrix = np.tile(parts.test_matrix[rows], (SHUFFLES, 1))
    orders = np.concatenate([random.permutation(len(rows)) for _ in range(SHUFFLES)])
    falls = {key: np.empty((matrix.shape[1], SHUFFLES)) for key in fitted}
    for key, one in fitted.items():
        whole = evaluation.roc_auc(one.probability(matrix[: len(rows)]), outcome)
        for position, column in enumerate(matrix.T):
            kept = column.copy()
            column[:] = kept[orders]
            shuffled = one.probability(matrix).reshape(SHUFFLES, len(rows))
            falls[key][position] = [whole - evaluation.roc_auc(probability, outcome) for probability in shuffled]
            column[:] = kept
    return falls


def columns(table: train.Table) -> pd.DataFrame:
    """One line per feature: its kind, how much is missing, and what its values are."""
    lines = []
    for column in table.schema.columns:
        values = table.frame[column.name]
        number = values if column.kind == NUMERIC else pd.Series(dtype=float)
        spread = [f"{number.quantile(q):,.6g}" if len(number) else "" for q in (0, 0.5, 1)]
        lines.append(
            [column.name, column.kind, f"{values.isna().mean():.1%}", values.nunique(), str(column.mode), *spread]
        )
    header = ["column", "kind", "missing", "different values", "most frequent", "smallest", "median", "largest"]
    return pd.DataFrame(lines, columns=header).set_index("column")


def score_table(metrics: Scores) -> pd.DataFrame:
    """Every score of every model with its 95% interval, beside the baseline."""

    def cell(key: str, score: Mapping[str, float]) -> str:
        return "{value:.3f}".format(**score) + (
            "" if key == train.BASELINE else " ({low:.3f}-{high:.3f})".format(**score)
        )

    return pd.DataFrame(
        {
            _plain(key): {_plain(name): cell(key, score) for name, score in of_one.items()}
            for key, of_one in metrics.items()
        }
    ).assign(better=[BETTER.get(name, "higher") for name in metrics[train.BASELINE]])


def on_the_data(table: train.Table, path: Path | str) -> str:
    """How many customers, how many stayed, what is missing, and where the data card is."""
    frame, schema = table.frame, table.schema
    outcome, target = outcomes(frame, schema.target), schema.target
    incomplete = frame[list(schema.names)].isna().mean()
    incomplete = incomplete[incomplete > 0].sort_values(ascending=False, kind="stable")
    sentences = [
        f"`{table.filename}` has {len(frame):,} rows and {len(schema.columns)} features.",
        f"{int(outcome.sum()):,} rows ({outcome.mean():.1%}) have `{target.name}` = {target.positive}: they stayed.",
        f"`{schema.identifier}` names the customer and is no feature."
        if schema.identifier
        else "No column names the customer, so every row counts as another one.",
        f"{len(incomplete)} of {len(schema.columns)} features have missing values, most of all "
        f"`{incomplete.index[0]}` ({incomplete.iloc[0]:.1%}); the model sees the training mode there."
        if len(incomplete)
        else "No value is missing.",
        f"Left out on purpose: {', '.join(f'`{name}`' for name in schema.dropped)}." if schema.dropped else "",
    ]
    card = Path(path).resolve().parent / "README.md"
    if card.exists() and table.filename in card.read_text(encoding="utf-8"):
        sentences.append(
            "Where the data comes from, what each column means and how the label is defined is in its data card, "
            f"`{card.parent.name}/{card.name}`."
        )
    else:
        sentences.append(
            f"There is no data card (a `README.md` that names `{table.filename}`) beside the file: write down where "
            "the data comes from, what each column means, and from which days features and label are taken."
        )
    return " ".join(filter(None, sentences))


def on_the_split(parts: train.Split) -> str:
    """Sizes and shares of the two parts, and what sorting by the best single column achieves."""
    rule = best_rule(parts)
    sentences = [
        f"{len(parts.train_outcome):,} rows to train on ({parts.train_outcome.mean():.1%} stayed), "
        f"{len(parts.test_outcome):,} held out ({parts.test_outcome.mean():.1%} stayed). No customer is in both parts."
    ]
    if rule:
        test_auc = evaluation.roc_auc(rule.score, parts.test_outcome)
        sentences.append(
            f"The simplest rule that a model has to beat is sorting by {rule}: "
            f"its ROC AUC is {test_auc:.3f} on the held-out rows."
        )
        sentences.append(
            f"**That is suspiciously good: find out whether `{rule.column}` was known before the outcome was.**"
            if rule.train_auc > SUSPICIOUS_AUC
            else f"No number or flag alone reaches {SUSPICIOUS_AUC} on the training rows, so none gives the answer "
            "away by itself."
        )
    return " ".join(sentences)


def on_the_scores(
    probabilities: Mapping[str, np.ndarray], parts: train.Split, metrics: Scores, seed: int = train.SEED
) -> str:
    """Who leads in ROC AUC, and whether by more than chance: over the next model, and over the best single column."""
    ranked = _ranked(metrics)
    best = ranked[0]
    auc = metrics[best]["roc_auc"]
    sentences = [f"**{_plain(best)}** has the highest ROC AUC, {auc['value']:.3f}."]
    rule = best_rule(parts)
    rivals = {_plain(key): probabilities[key] for key in ranked[1:]} | ({str(rule): rule.score} if rule else {})
    for name, score in rivals.items():
        lead = evaluation.difference(
            probabilities[best], score, parts.test_outcome, seed=seed, customers=parts.test_customers
        )
        sentences.append(f"Its lead over {name} is {lead['value']:.3f} ({_interval(lead)}): {_verdict(lead)}.")
    right, always = (metrics[key]["accuracy"] for key in (best, train.BASELINE))
    sentences.append(
        f"It gives {right['value']:.1%} of the customers the right label; always giving the larger class is right "
        f"for {always['value']:.1%}."
    )
    sentences.append("The best of several on the same rows looks a little better than it is.")
    return " ".join(sentences)


def on_the_curves(probabilities: Mapping[str, np.ndarray], outcome: np.ndarray) -> str:
    """What precision is left at the threshold that finds half of those who stay."""
    precisions = []
    for key, probability in probabilities.items():
        contacted, found = evaluation.cumulative_gains(probability, outcome)
        half = int(np.argmax(found >= 0.5))
        precisions.append(f"{found[half] / contacted[half] * np.mean(outcome):.0%} ({_plain(key)})")
    return (
        f"At the threshold that finds half of those who stayed, this share of the customers found did stay: "
        f"{', '.join(precisions)}. Chosen blindly, {np.mean(outcome):.0%} would."
    )


def on_the_calibration(probabilities: Mapping[str, np.ndarray], outcome: np.ndarray) -> str:
    """For each model its mean gap, and the bin in which it misses most."""
    lines = []
    for key, probability in probabilities.items():
        error = evaluation.expected_calibration_error(probability, outcome)
        predicted, observed, count = evaluation.calibration_bins(probability, outcome)
        line = f"- **{_plain(key)}**: predicted and observed retention lie {100 * error:.1f} points apart on average"
        large = np.flatnonzero(count >= FEWEST_IN_BIN)
        if len(large):
            worst = large[np.argmax(np.abs(observed - predicted)[large])]
            line += (
                f"; farthest, among the larger bins, where it says {predicted[worst]:.0%} on average and "
                f"{observed[worst]:.0%} of {count[worst]:,} customers stayed"
            )
        lines.append(f"{line}.")
    return "\n".join(lines)


def on_the_gains(probabilities: Mapping[str, np.ndarray], outcome: np.ndarray, metrics: Scores) -> str:
    """Who is in the tenth with the highest probabilities, and in the tenth with the lowest."""
    best = _ranked(metrics)[0]
    outcome = np.asarray(outcome)
    lift = evaluation.top_decile_lift(probabilities[best], outcome)
    # The lowest tenth is the highest of the opposite question: will the customer leave?
    left = evaluation.top_decile_lift(1 - probabilities[best], 1 - outcome) * (1 - outcome.mean())
    return (
        f"By {_plain(best)}, the tenth of the customers with the highest probabilities holds "
        f"{lift * evaluation.TOP_SHARE:.0%} of all who stayed (lift {lift:.1f}). In the tenth with the lowest, "
        f"{left:.0%} left, against {1 - outcome.mean():.0%} of all: that is where an offer to those about to leave "
        "would begin."
    )


def on_the_importance(falls: Mapping[str, np.ndarray], features: Sequence[str]) -> str:
    """What each model leans on most, and how many columns it could do without."""
    lines = []
    for key, fall in falls.items():
        mean = fall.mean(axis=1)
        idle = int((mean < 0.001).sum())
        lines.append(
            f"- **{_plain(key)}** leans most on `{features[int(mean.argmax())]}` (a fall of {mean.max():.3f}); "
            f"shuffling costs less than 0.001 for {idle} of its {len(features)} columns."
        )
    return "\n".join(
        [
            *lines,
            "",
            "Columns that tell the same story stand in for each other, so a small fall does not mean that a column "
            "is unrelated to staying, and none of this says what would happen if a column were changed.",
        ]
    )


def on_the_confusion(probabilities: Mapping[str, np.ndarray], outcome: np.ndarray) -> str:
    """Precision and recall of the label in plain words, and how often it is given."""
    outcome = np.asarray(outcome) == 1
    lines = []
    for key, probability in probabilities.items():
        said = np.asarray(probability) > evaluation.THRESHOLD
        if not said.any():
            lines.append(f"- **{_plain(key)}** says of nobody that they will stay.")
            continue
        lines.append(
            f"- **{_plain(key)}** says of {said.mean():.0%} that they will stay. Of those, {outcome[said].mean():.0%} "
            f"did; of all who stayed, it named {said[outcome].mean():.0%}."
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{outcome.mean():.0%} stayed in truth. One half is the API's threshold for a label; what a missed "
            "customer and a wasted offer cost may call for another one, and the probability is there for that.",
        ]
    )


def on_the_run(run: TrainingRun) -> pd.DataFrame:
    """The files of a run, as its manifest names them."""
    files = [[name, f"{file['bytes']:,}", file["sha256"][:12]] for name, file in run.manifest["files"].items()]
    return pd.DataFrame(files, columns=["file", "bytes", "SHA-256 begins"]).set_index("file")


def _ranked(metrics: Scores) -> list[str]:
    """Models by ROC AUC, highest first."""
    return sorted(set(metrics) - {train.BASELINE}, key=lambda key: (-metrics[key]["roc_auc"]["value"], key))


def _interval(score: Mapping[str, float]) -> str:
    return "95% interval {low:.3f} to {high:.3f}".format(**score)


def _verdict(lead: Mapping[str, float]) -> str:
    if lead["low"] > 0:
        return "more than chance"
    if lead["high"] < 0:
        return "it is behind by more than chance"
    return "these rows cannot tell them apart"


def _plain(name: str) -> str:
    return name.replace("_", " ")
