"""The figures show the numbers they are given, name their axes, and give each model one colour."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

import evaluation
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
    arms = {key: probability > 0.5 for key, probability in list(models[0].items())[:2]}
    names = [f"price in $ and then some more words, column {number}" for number in range(30)]
    importance = plots.importance(falls, names)
    for number, figure in enumerate([importance, *of_probabilities(models), plots.ab_test(arms)]):
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


def test_a_test_ends_at_the_accuracy_of_each_arm_and_an_arm_without_labels_is_left_blank():
    figure = plots.ab_test({"first 1.0.0": np.array([True, False, True, True]), "second 1.0.0": np.array([], bool)})
    end, course = figure.axes
    assert [text.get_text() for text in end.texts] == ["75.0%\nof 4"]
    assert line(course, "first 1.0.0")[1].tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4])
    assert [label.get_text() for label in end.get_xticklabels()] == ["first\n1.0.0", "second\n1.0.0"]
