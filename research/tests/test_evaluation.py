"""The scores agree with scikit-learn, with hand-made figures, and with theory where it has something to say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

import evaluation

# The example of scikit-learn's documentation: an AUC of 0.75 and an average precision of 0.83.
PUBLISHED = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])

SKLEARN = {
    "roc_auc": sklearn_metrics.roc_auc_score,
    "pr_auc": sklearn_metrics.average_precision_score,
    "brier": sklearn_metrics.brier_score_loss,
    "log_loss": sklearn_metrics.log_loss,
    "accuracy": lambda outcome, probability, sample_weight: sklearn_metrics.accuracy_score(
        outcome, probability > 0.5, sample_weight=sample_weight
    ),
}


def noisy(rows, seed=3):
    """Probabilities that are right: each outcome is drawn with its probability."""
    random = np.random.default_rng(seed)
    probability = random.random(rows)
    return probability, (random.random(rows) < probability).astype(int)


@st.composite
def answers(draw):
    """Probabilities with many ties and both edges, outcomes of both classes, and whole weights that keep both."""
    cells = st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.5000001, 0.9, 1.0]), st.integers(0, 1), st.integers(0, 3))
    rows = [*draw(st.lists(cells, max_size=30)), (draw(st.floats(0, 1)), 0, 1), (draw(st.floats(0, 1)), 1, 2)]
    probability, outcome, weight = map(np.array, zip(*rows, strict=True))
    return probability, outcome, weight


@pytest.mark.parametrize("name", SKLEARN)
@given(answers())
def test_a_score_is_that_of_scikit_learn_with_and_without_weights(name, given_answers):
    probability, outcome, weight = given_answers
    metric = evaluation.METRICS[name]
    assert metric(probability, outcome) == pytest.approx(SKLEARN[name](outcome, probability, sample_weight=None))
    assert metric(probability, outcome, weight) == pytest.approx(
        SKLEARN[name](outcome, probability, sample_weight=weight)
    )


@pytest.mark.parametrize("name", evaluation.METRICS)
@given(answers())
def test_a_weight_counts_a_row_that_often(name, given_answers):
    probability, outcome, weight = given_answers
    metric = evaluation.METRICS[name]
    repeated = metric(np.repeat(probability, weight), np.repeat(outcome, weight))
    assert metric(probability, outcome, weight) == pytest.approx(repeated)


@pytest.mark.parametrize("name", evaluation.METRICS)
def test_a_matrix_of_weights_gives_one_score_for_each_row(name):
    probability, outcome = noisy(50)
    weights = np.random.default_rng(0).integers(0, 3, (4, 50))
    metric = evaluation.METRICS[name]
    one_by_one = [metric(probability, outcome, weight) for weight in weights]
    assert metric(probability, outcome, weights) == pytest.approx(one_by_one)


def test_the_published_example_has_its_published_scores():
    assert evaluation.roc_auc(*PUBLISHED) == 0.75
    assert evaluation.pr_auc(*PUBLISHED) == pytest.approx(0.8333, abs=1e-4)


def test_one_half_is_labelled_as_leaving():
    assert evaluation.accuracy(np.array([0.5, 0.6]), np.array([0, 1])) == 1
    assert evaluation.accuracy(np.array([0.5, 0.6]), np.array([1, 0])) == 0


def test_calibration_error_weighs_the_gap_of_each_bin_by_its_size():
    probability = np.array([0.2, 0.2, 0.2, 0.2, 0.95])
    outcome = np.array([1, 1, 0, 0, 1])
    # The first bin predicts 0.2 and sees 0.5, for four of five rows; the last predicts 0.95 and sees 1.
    assert evaluation.expected_calibration_error(probability, outcome) == pytest.approx(0.8 * 0.3 + 0.2 * 0.05)
    predicted, observed, count = evaluation.calibration_bins(probability, outcome)
    assert predicted == pytest.approx([0.2, 0.95])
    assert observed == pytest.approx([0.5, 1.0])
    assert count.tolist() == [4, 1]


def test_zero_and_one_belong_to_the_outer_bins():
    predicted, observed, count = evaluation.calibration_bins(np.array([0.0, 1.0]), np.array([0, 1]))
    assert (predicted.tolist(), observed.tolist(), count.tolist()) == ([0, 1], [0, 1], [1, 1])


def test_lift_is_retention_in_the_best_tenth_over_retention_in_all():
    probability = np.linspace(1, 0, 20)
    outcome = np.array([1, 0] + [1] * 3 + [0] * 15)
    assert evaluation.top_decile_lift(probability, outcome) == pytest.approx(0.5 / 0.2)


def test_ties_at_the_edge_of_the_best_tenth_count_in_proportion():
    probability = np.array([0.9, *[0.5] * 19])
    outcome = np.array([1, *[1] * 4, *[0] * 15])
    # One customer is in for certain; the second place goes to one of 19, of whom 4 were retained.
    assert evaluation.top_decile_lift(probability, outcome) == pytest.approx((1 + 4 / 19) / 2 / 0.25)


def test_a_constant_has_no_lift_and_ranks_nobody():
    probability, outcome = np.full(30, 0.3), np.array([1] * 9 + [0] * 21)
    assert evaluation.top_decile_lift(probability, outcome) == pytest.approx(1)
    assert evaluation.roc_auc(probability, outcome) == 0.5
    assert evaluation.pr_auc(probability, outcome) == pytest.approx(0.3)
    assert evaluation.expected_calibration_error(probability, outcome) == pytest.approx(0)


def test_the_gains_curve_rises_from_nobody_to_everybody_and_gives_the_lift():
    probability, outcome = noisy(1000)
    contacted, found = evaluation.cumulative_gains(probability, outcome)
    assert (contacted[0], found[0], contacted[-1], found[-1]) == (0, 0, 1, 1)
    assert found[100] / contacted[100] == pytest.approx(evaluation.top_decile_lift(probability, outcome))


def test_the_interval_of_a_share_is_the_normal_one():
    probability, outcome = noisy(2000)
    score = evaluation.scores(probability, outcome, seed=1, resamples=2000)["accuracy"]
    half = 1.96 * np.sqrt(score["value"] * (1 - score["value"]) / 2000)
    assert score["low"] == pytest.approx(score["value"] - half, abs=0.002)
    assert score["high"] == pytest.approx(score["value"] + half, abs=0.002)


def test_intervals_are_the_same_for_the_same_seed_and_hold_the_score():
    probability, outcome = noisy(300)
    once = evaluation.scores(probability, outcome, seed=5, resamples=100)
    assert once == evaluation.scores(probability, outcome, seed=5, resamples=100)
    assert once != evaluation.scores(probability, outcome, seed=6, resamples=100)
    for name in set(once) - {"expected_calibration_error"}:
        assert once[name]["low"] < once[name]["value"] < once[name]["high"]


def test_resamples_are_the_same_however_many_fit_in_memory(monkeypatch):
    probability, outcome = noisy(200)
    whole = evaluation.scores(probability, outcome, seed=5, resamples=20)
    monkeypatch.setattr(evaluation, "_NUMBERS_AT_A_TIME", 600)
    in_blocks = evaluation.scores(probability, outcome, seed=5, resamples=20)
    for name, score in whole.items():
        assert in_blocks[name] == pytest.approx(score)


def test_seeing_every_customer_twice_narrows_no_interval():
    probability, outcome = noisy(200)
    once = evaluation.scores(probability, outcome, seed=5, resamples=50)
    customers = np.tile(np.arange(200), 2)
    twice = evaluation.scores(np.tile(probability, 2), np.tile(outcome, 2), seed=5, resamples=50, customers=customers)
    for name, score in once.items():
        assert twice[name] == pytest.approx(score)


def test_one_retained_customer_among_many_still_has_finite_intervals():
    probability, outcome = np.linspace(0, 1, 12), np.array([0] * 11 + [1])
    for score in evaluation.scores(probability, outcome, seed=0, resamples=50).values():
        assert np.isfinite([score["value"], score["low"], score["high"]]).all()


def test_a_lead_is_the_difference_of_the_scores_with_an_interval_of_its_own():
    probability, outcome = noisy(800)
    blurred = probability + np.random.default_rng(1).normal(0, 0.02, 800)
    lead = evaluation.difference(probability, blurred, outcome, seed=5, resamples=200)
    both = [evaluation.scores(one, outcome, seed=5, resamples=200)["roc_auc"] for one in (probability, blurred)]
    assert lead["value"] == pytest.approx(both[0]["value"] - both[1]["value"])
    assert lead["low"] < lead["value"] < lead["high"]
    # Both orders find the same customers hard, so their difference is known far better than either.
    assert lead["high"] - lead["low"] < (both[0]["high"] - both[0]["low"]) / 3


def test_a_model_has_no_lead_over_itself():
    probability, outcome = noisy(100)
    lead = evaluation.difference(probability, probability, outcome, seed=5, resamples=50)
    assert lead == {"value": 0, "low": 0, "high": 0}


@given(st.integers(1, 400), st.data())
def test_the_interval_of_a_count_is_wilsons(total, data):
    count = data.draw(st.integers(0, total))
    expected = binomtest(count, total).proportion_ci(method="wilson")
    low, high = evaluation.wilson_interval(count, total)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert low <= count / total <= high  # exactly, or a plot of what lies between would be refused
