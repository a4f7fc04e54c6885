"""The notebook's tables and sentences say what the numbers say, whatever the table."""

import re

import numpy as np
import pandas as pd
import pytest
from sklearn.inspection import permutation_importance

import evaluation
import report
import train


def members(rows=400, seed=1):
    """Visits tell who stays; the colour of the card tells nothing; the age is often unknown."""
    random = np.random.default_rng(seed)
    visits = random.poisson(4, rows)
    stays = random.random(rows) < 1 / (1 + np.exp(3 - visits))
    return pd.DataFrame(
        {
            "MemberKey": [f"M{number}" for number in range(rows)],
            "Card": random.choice(["blue", "gold"], rows),
            "Visits": visits,
            "Age": np.where(random.random(rows) < 0.25, np.nan, random.integers(18, 90, rows)),
            "Stayed": np.where(stays, "yes", "no"),
        }
    )


def split_of(frame, path, **options):
    frame.to_csv(path, index=False)
    table = train.load_table(path, "Stayed", **options)
    return table, train.split(table)


@pytest.fixture
def csv(tmp_path):
    return tmp_path / "members.csv"


@pytest.fixture
def trained(csv):
    table, parts = split_of(members(), csv)
    return table, parts, train.fit(parts)


def metrics_of(probabilities, parts):
    scored = {key: evaluation.scores(p, parts.test_outcome, seed=1, resamples=20) for key, p in probabilities.items()}
    baseline = evaluation.scores(np.full(len(parts.test_outcome), 0.5), parts.test_outcome, seed=1, resamples=20)
    return {train.BASELINE: baseline, **scored}


def test_the_table_of_columns_has_a_line_for_each_feature(trained):
    table, *_ = trained
    lines = report.columns(table)
    assert list(lines.index) == ["Card", "Visits", "Age"]
    assert lines.loc["Card", ["kind", "missing", "different values", "median"]].tolist() == [
        "categorical",
        "0.0%",
        2,
        "",
    ]
    assert lines.loc["Visits", "largest"] == str(table.frame["Visits"].max())
    assert lines.loc["Age", "missing"] == f"{table.frame['Age'].isna().mean():.1%}"


def test_the_data_are_told_by_their_own_numbers(trained, csv):
    table, *_ = trained
    stayed = int((table.frame["Stayed"] == "yes").sum())
    told = report.on_the_data(table, csv)
    assert "400 rows and 3 features" in told
    assert f"{stayed} rows ({stayed / 400:.1%}) have `Stayed` = yes" in told
    assert "`MemberKey` names the customer" in told
    assert "1 of 3 features have missing values, most of all `Age`" in told
    assert "There is no data card" in told


def test_a_data_card_beside_the_file_is_named(trained, csv):
    (csv.parent / "README.md").write_text("# How to install the till")
    assert "no data card" in report.on_the_data(trained[0], csv)
    (csv.parent / "README.md").write_text("# Data card: members.csv")
    told = report.on_the_data(trained[0], csv)
    assert f"`{csv.parent.name}/README.md`" in told
    assert "no data card" not in told


def test_a_table_that_misses_nothing_and_names_nobody_is_told_so(csv):
    table, _ = split_of(members()[["Visits", "Card", "Stayed"]], csv, drop=["Card"])
    told = report.on_the_data(table, csv)
    assert "No value is missing." in told
    assert "No column names the customer" in told
    assert "Left out on purpose: `Card`." in told


def test_the_best_rule_is_the_column_that_sorts_best_in_its_direction(csv):
    frame = members().assign(Absences=lambda table: 20 - table.pop("Visits"))
    _, parts = split_of(frame[["MemberKey", "Card", "Absences", "Age", "Stayed"]], csv)
    rule = report.best_rule(parts)
    assert str(rule) == "`Absences` alone (lowest first)"
    assert evaluation.roc_auc(rule.score, parts.test_outcome) > 0.7


def test_without_numbers_there_is_no_rule(csv):
    _, parts = split_of(members()[["MemberKey", "Card", "Stayed"]], csv)
    assert report.best_rule(parts) is None
    assert "rule" not in report.on_the_split(parts)


def test_a_column_that_gives_the_answer_away_is_suspected(csv):
    _, parts = split_of(members().assign(ClosedOn=lambda table: (table["Stayed"] == "no").astype(int)), csv)
    assert "find out whether `ClosedOn` was known before" in report.on_the_split(parts)


def test_without_a_giveaway_nothing_is_suspected(trained):
    _, parts, _ = trained
    assert "suspiciously" not in report.on_the_split(parts)
    assert f"{len(parts.test_rows)} held out" in report.on_the_split(parts)


def test_a_lead_is_called_one_only_when_its_interval_is_above_zero(trained):
    _, parts, _ = trained
    random = np.random.default_rng(0)
    good = np.clip(0.5 + 0.3 * (parts.test_outcome - 0.5) + random.normal(0, 0.1, len(parts.test_outcome)), 0, 1)
    probabilities = {
        "best": good,
        "like_the_best": np.clip(good + random.normal(0, 0.005, len(good)), 0, 1),
        "blind": random.random(len(good)),
    }
    told = report.on_the_scores(probabilities, parts, metrics_of(probabilities, parts))
    verdicts = dict(re.findall(r"lead over (.+?) is .*?\): (.*?)\.", told))
    assert verdicts == {
        "like the best": "these rows cannot tell them apart",
        "blind": "more than chance",
        "`Visits` alone (highest first)": "more than chance",
    }


def test_models_that_lose_to_one_column_are_told_so(trained):
    _, parts, _ = trained
    probabilities = {"blind": np.random.default_rng(0).random(len(parts.test_outcome))}
    told = report.on_the_scores(probabilities, parts, metrics_of(probabilities, parts))
    assert "`Visits` alone (highest first) is -0." in told
    assert "it is behind by more than chance" in told


def test_the_score_table_has_an_interval_for_each_model_and_none_for_the_baseline(trained):
    _, parts, fitted = trained
    metrics = train.evaluate(fitted, parts, resamples=20)
    table = report.score_table(metrics)
    auc = metrics["random_forest"]["roc_auc"]
    assert table.loc["roc auc", "random forest"] == "{value:.3f} ({low:.3f}-{high:.3f})".format(**auc)
    assert table.loc["roc auc", "baseline"] == "0.500"
    assert table.loc["brier", "better"] == "lower"
    assert list(table.index) == [name.replace("_", " ") for name in evaluation.METRICS]


def test_curves_gains_and_labels_are_put_in_words():
    probability = np.array([0.9] * 10 + [0.6] * 10 + [0.2] * 70 + [0.1] * 10)
    outcome = np.array([1] * 9 + [0] + [1] * 5 + [0] * 5 + [1] * 6 + [0] * 64 + [0] * 10)
    assert "95% (model)" not in report.on_the_curves({"model": probability}, outcome)
    assert "70% (model). Chosen blindly, 20% would." in report.on_the_curves({"model": probability}, outcome)
    gains = report.on_the_gains(
        {"model": probability},
        outcome,
        {train.BASELINE: {}, "model": evaluation.scores(probability, outcome, seed=1, resamples=5)},
    )
    assert "holds 45% of all who stayed (lift 4.5)" in gains
    assert "100% left, against 80% of all" in gains
    confusion = report.on_the_confusion({"model": probability}, outcome)
    assert "says of 20% that they will stay. Of those, 70% did; of all who stayed, it named 70%" in confusion
    calibration = report.on_the_calibration({"model": probability}, outcome)
    assert "it says 20% on average and 9% of 70 customers stayed" in calibration


def test_a_model_that_never_says_stays_is_told_so():
    told = report.on_the_confusion({"timid": np.full(10, 0.3)}, np.array([1] * 3 + [0] * 7))
    assert "**timid** says of nobody that they will stay" in told


def test_shuffling_hurts_where_the_model_leans(trained):
    _, parts, fitted = trained
    falls = report.shuffled_importance(fitted, parts)
    assert {key: fall.shape for key, fall in falls.items()} == dict.fromkeys(fitted, (3, report.SHUFFLES))
    assert all(parts.schema.names[fall.mean(axis=1).argmax()] == "Visits" for fall in falls.values())
    assert report.on_the_importance(falls, parts.schema.names).count("leans most on `Visits`") == 3
    again = report.shuffled_importance(fitted, parts)
    assert all(np.array_equal(falls[key], again[key]) for key in falls)


def test_a_part_of_many_customers_is_enough_to_see_what_matters(trained, monkeypatch):
    _, parts, fitted = trained
    monkeypatch.setattr(report, "MOST_CELLS", 180)
    monkeypatch.setattr(report, "FEWEST_SHUFFLED", 10)
    fall = report.shuffled_importance(fitted, parts)["random_forest"]
    assert parts.schema.names[fall.mean(axis=1).argmax()] == "Visits"


def test_importance_is_scikit_learns_but_for_the_draws(trained):
    _, parts, fitted = trained
    ours = report.shuffled_importance(fitted, parts)
    for key, one in fitted.items():
        theirs = permutation_importance(
            one.model, parts.test_matrix, parts.test_outcome, scoring="roc_auc", n_repeats=50, random_state=0
        )
        assert ours[key].mean(axis=1) == pytest.approx(theirs.importances_mean, abs=0.03)
