"""The figures show the numbers they are given, name their axes, and give each model one colour."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

import evaluation
import peeking
import plots


@pytest.fixture(params=[1, 3, 8], ids=lambda count: f"{count} models")
def models(request):
    random = np.random.default_rng(3)
    outcome = (random.random(600) < 0.3).astype(int)
    blur = {f"model_{number}": random.normal(0, 0.2 + number / 10, 600) for number in range(request.param)}
    return {key: np.clip(0.25 + 0.3 * outcome + noise, 0, 1) for key, noise in blur.items()}, outcome


def of_probabilities(models):
    return [
        plots.roc_and_precision_recall(*models),
        plots.calibration(*models),
        plots.gains_and_lift(*models),
        plots.confusion(*models),
    ]


def line(axes, label):
    (found,) = [one for one in axes.lines if one.get_label() == label]
    return found.get_xdata(), found.get_ydata()


def test_every_figure_can_be_drawn_and_labels_its_outer_axes(models, tmp_path):
    falls = {key: np.random.default_rng(0).normal(0, 0.01, (30, 5)) for key in models[0]}
    names = [f"price in $ and then some more words, column {number}" for number in range(30)]
    importance = plots.importance(falls, names)
    for number, figure in enumerate([importance, *of_probabilities(models)]):
        figure.savefig(tmp_path / f"{number}.png")
        assert any(axes.get_xlabel() for axes in figure.axes)
        assert figure is importance or figure.axes[0].get_ylabel()


def test_the_area_under_the_roc_curve_is_the_score(models):
    roc, _ = plots.roc_and_precision_recall(*models).axes
    for key, probability in models[0].items():
        area = np.trapezoid(line(roc, key.replace("_", " "))[1], line(roc, key.replace("_", " "))[0])
        assert area == pytest.approx(evaluation.roc_auc(probability, models[1]))


def test_the_area_under_the_precision_recall_steps_is_the_score(models):
    _, axes = plots.roc_and_precision_recall(*models).axes
    curves = [one for one in axes.lines if one.get_drawstyle() == "steps-post"]
    for curve, probability in zip(curves, models[0].values(), strict=True):
        recall, precision = curve.get_data()
        area = np.sum(-np.diff(recall) * precision[:-1])
        assert area == pytest.approx(evaluation.pr_auc(probability, models[1]))


def test_the_lift_of_a_tenth_can_be_read_from_its_curve(models):
    gains, lift = plots.gains_and_lift(*models).axes
    curves = lift.lines[1:]
    for (key, probability), curve in zip(models[0].items(), curves, strict=True):
        share, value = curve.get_data()
        expected = evaluation.top_decile_lift(probability, models[1])
        assert np.interp(0.1, share, value) == pytest.approx(expected, rel=0.02)
        assert line(gains, key.replace("_", " "))[1][-1] == 1


def test_the_confusion_of_a_model_counts_every_customer_once(models):
    outcome = models[1]
    for axes, probability in zip(plots.confusion(*models).axes, models[0].values(), strict=True):
        counts = [int(text.get_text().split("\n")[0]) for text in axes.texts]
        said = probability > 0.5
        assert counts == [
            (~said & (outcome == 0)).sum(),
            (said & (outcome == 0)).sum(),
            (~said & (outcome == 1)).sum(),
            (said & (outcome == 1)).sum(),
        ]


def test_a_model_has_one_look_in_every_figure_and_no_two_models_share_it(models):
    probabilities, _ = models
    looks = {}
    for figure in (plots.roc_and_precision_recall(*models), plots.gains_and_lift(*models)):
        for one in figure.axes[0].lines:
            looks.setdefault(one.get_label(), set()).add((to_hex(one.get_color()), one.get_linestyle()))
    of_models = [looks[key.replace("_", " ")] for key in probabilities]
    assert all(len(look) == 1 for look in of_models)
    assert len(set.union(*of_models)) == len(probabilities)


def test_importance_shows_the_columns_that_matter_most_first():
    falls = {"a": np.array([[0.0, 0.0], [0.2, 0.4], [0.1, 0.1]]), "b": np.array([[0.0, 0.0], [0.1, 0.1], [0.1, 0.1]])}
    (axes,) = plots.importance(falls, ["Idle", "Strong", "Weak"], most=2).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Strong", "Weak"]
    assert axes.yaxis_inverted()


def test_every_figure_of_ab_tests_can_be_drawn_and_names_what_it_shows(tmp_path):
    right = np.random.default_rng(1).random(500) < 0.8
    tests = peeking.splits(right, right, tests=60, seed=1)
    course = peeking.misled(tests)
    figures = [
        plots.only_one_right([{"first": right, "second": ~right}, {"first": right, "third": right}]),
        plots.false_promotions(tests.labelled, peeking.promotions(tests), tests.alpha),
        plots.one_test(course.labelled, course.difference, course.intervals, course.p, tests.alpha),
        plots.customers_needed({"split": np.array([np.inf, 5, 9]), "shadow": np.array([np.inf, np.inf, np.inf])}),
        plots.narrowing(np.array([50]), np.array([0.1]), np.array([[-0.3, 0.5]])),
    ]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert all(axes.get_title() and axes.get_xlabel() for axes in figure.axes)
    assert all(figure.axes[0].get_ylabel() for figure in figures[1:])


def test_each_bar_is_as_long_as_one_model_alone_is_right():
    first, second = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    (axes,) = plots.only_one_right([{"random_forest 1.0.0": first, "tree": second}]).axes
    assert [bar.get_width() for bar in axes.patches] == [-2, 1]
    assert [text.get_text() for text in axes.texts] == ["only random forest 1.0.0: 2", "only tree: 1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["60.0% right\nagainst 40.0% right"]


def test_two_models_that_never_differ_have_bars_of_no_length():
    (axes,) = plots.only_one_right([{"first": np.ones(3, bool), "second": np.ones(3, bool)}]).axes
    assert [bar.get_width() for bar in axes.patches] == [0, 0]


def test_false_promotions_end_at_the_share_that_is_written_beside_them():
    (axes,) = plots.false_promotions(np.array([200, 400]), {"a rule": np.array([0.1, 0.25])}, 0.05).axes
    assert line(axes, "a rule")[1].tolist() == [0.1, 0.25]
    assert [text.get_text() for text in axes.texts] == ["promised: at most 5%", "25.0%"]


def test_a_test_is_marked_where_a_rule_promotes_and_only_there():
    lead, chance = plots.one_test(
        labelled=np.array([200, 400, 600]),
        difference=np.array([-0.1, 0.1, 0.05]),
        intervals={
            "one look": np.array([[-0.2, -0.01], [0.02, 0.18], [-0.03, 0.13]]),
            "any": np.array([[-0.4, 0.2], [-0.1, 0.3], [-0.1, 0.2]]),
        },
        p={"one look": np.array([0.03, 0.01, 0.2]), "any": np.array([1, 0.3, 0.6])},
        alpha=0.05,
    ).axes
    assert line(lead, "difference")[1].tolist() == pytest.approx([-10, 10, 5])
    points = [one.get_xydata().tolist() for one in chance.lines if one.get_marker() == "o"]
    assert points == [[[400, 0.01]]]


def test_half_of_the_tests_have_promoted_at_the_marked_customer():
    needed = {"split": np.array([100, 200, 300, np.inf]), "shadow": np.array([50, np.inf, np.inf, np.inf])}
    (axes,) = plots.customers_needed(needed).axes
    assert [text.get_text() for text in axes.texts] == ["half by 200"]
    assert line(axes, "split")[1].tolist() == [0, 0.25, 0.5, 0.75]


def test_a_live_test_is_drawn_in_points_around_zero():
    interval = np.array([[-1.0, 1.0], [-0.3, 0.5], [-0.1, 0.2], [-0.1, 0.1], [-0.05, 0.1]])
    (axes,) = plots.narrowing(np.arange(1, 6) * 50, interval.mean(axis=1), interval).axes
    assert line(axes, "difference")[1].tolist() == pytest.approx([0, 10, 5, 0, 2.5])
    low, high = axes.get_ylim()
    assert low == -high
    assert 50 < high < 100


def test_a_live_test_without_labels_is_an_empty_figure(tmp_path):
    nothing = np.empty(0)
    plots.narrowing(nothing, nothing, np.empty((0, 2))).savefig(tmp_path / "nothing.png")
