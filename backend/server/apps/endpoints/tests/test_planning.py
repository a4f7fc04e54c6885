"""/api/v1/abtests/plan: how many labelled customers, and days, a test needs before it can end."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apps.endpoints import planning, statistics

PLAN = "/api/v1/abtests/plan"
FROM_80_TO_82 = {"baseline": 0.8, "lift": 0.02}
SHARES = st.floats(0.001, 0.999)


def planned(api, **query) -> dict:
    response = api.get(PLAN, query)
    assert response.status_code == 200, response.content
    return response.json()


def refused(api, **query) -> dict[str, str]:
    response = api.get(PLAN, query)
    assert response.status_code == 400, response.content
    return {problem["field"]: problem["message"] for problem in response.json()["errors"]}


class TestAPlan:
    def test_says_what_each_design_needs(self, api, db):
        plan = planned(api, **FROM_80_TO_82, disagreement=0.08, per_day=500)

        assert plan["split"]["fixed_sample"] == {"labelled": 12078, "champion": 6039, "challenger": 6039, "days": 25}
        assert plan["shadow"]["fixed_sample"] == {"labelled": 1568, "champion": None, "challenger": None, "days": 4}
        assert plan["split"]["anytime_valid_median"]["labelled"] == pytest.approx(11_800, rel=0.06)
        assert plan["shadow"]["anytime_valid_median"]["labelled"] == pytest.approx(1_600, rel=0.12)

    def test_says_it_in_sentences_that_a_manager_can_read(self, api, db):
        assert planned(api, **FROM_80_TO_82, disagreement=0.08, per_day=500)["message"] == (
            "To show that 82% accuracy is better than 80%, with a chance of 80% and at most 5% for a false alarm: "
            "a split needs about 20,300 labelled customers (41 days), and half of such tests end by 11,200 (23 days); "
            "one look, and none before, needs 12,100 (25 days). "
            "A shadow needs about 2,580 labelled customers (6 days), and half of such tests end by 1,430 (3 days); "
            "one look, and none before, needs 1,570 (4 days)."
        )

    def test_has_no_shadow_without_disagreement_and_no_days_without_traffic(self, api, db):
        plan = planned(api, **FROM_80_TO_82)

        assert plan["shadow"] is None
        assert {need["days"] for need in plan["split"].values()} == {None}
        assert "How many a shadow needs depends on disagreement" in plan["message"]

    def test_gives_each_arm_its_share(self, api, db):
        plan = planned(api, **FROM_80_TO_82, weight=0.1)

        for need in plan["split"].values():
            assert need["challenger"] == pytest.approx(need["labelled"] / 10, abs=1)
            assert need["champion"] + need["challenger"] == need["labelled"]
        assert (
            plan["split"]["anytime_valid"]["labelled"]
            > planned(api, **FROM_80_TO_82)["split"]["anytime_valid"]["labelled"]
        )

    def test_needs_a_token_in_production_as_all_that_is_read(self, api, db, settings):
        settings.DEBUG = False

        assert api.get(PLAN, FROM_80_TO_82).status_code == 401


class TestAPlanIsRefused:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("baseline", value) for value in (0, 1, -1, 1.5, "nan", "high")),
            *(("lift", value) for value in (0, -0.02, 0.2, 0.5, 0.00001, "nan")),
            *(("disagreement", value) for value in (0, 0.01, 1.01, "inf")),
            *(("alpha", value) for value in (0, 1, "nan")),
            *(("power", value) for value in (0, 1, 0.05)),
            *(("per_day", value) for value in (0, -5, 1e-300, "inf")),
            *(("weight", value) for value in (0, 1, 0.001)),
        ],
    )
    def test_by_the_name_of_what_cannot_be(self, api, db, field, value):
        problems = refused(api, **{**FROM_80_TO_82, field: value})

        assert list(problems) == [field]
        assert problems[field].startswith(f"{field}: ")

    def test_without_what_it_is_about(self, api, db):
        assert set(refused(api)) == {"baseline", "lift"}


class TestWhatATestNeeds:
    def test_has_the_published_sample_size_of_two_shares(self):
        """The first example of R's power.prop.test: 0.50 against 0.75 with power 0.90, n = 76.7 in each group."""
        needed = planning.plan(0.50, 0.25, power=0.9).split.fixed_sample

        assert (needed.champion, needed.challenger) == (77, 77)

    def test_in_pairs_of_one_look_is_connors_formula(self):
        z_alpha, z_power, disagreement, lift = 1.959964, 1.281552, 0.3, 0.05
        n = (z_alpha * math.sqrt(disagreement) + z_power * math.sqrt(disagreement - lift**2)) ** 2 / lift**2

        assert planning.plan(0.7, lift, disagreement, power=0.9).shadow.fixed_sample.labelled == math.ceil(n)

    def test_is_enough_for_the_verdict_if_the_difference_is_as_planned(self):
        """With a power of one half or more, by the time that it needs, the very difference planned is significant."""
        plan = planning.plan(0.8, 0.02, 0.08, power=0.8)
        arm = plan.split.anytime_valid.champion
        pairs = plan.shadow.anytime_valid.labelled

        assert statistics.split_difference(round(0.8 * arm), arm, round(0.82 * arm), arm, 0.05).p < 0.05
        assert statistics.paired_difference(round(0.05 * pairs), round(0.03 * pairs), pairs, 0.05).p < 0.05

    @settings(deadline=None, max_examples=60)
    @given(SHARES, SHARES, SHARES, st.floats(1e-6, 0.5), SHARES, st.floats(0.01, 0.99))
    @example(0.001, 0.226, 0.999, 2.2e-6, 0.001, 0.01)
    def test_can_be_said_of_whatever_can_be(self, baseline, lift, disagreement, alpha, power, weight):
        try:
            plan = planning.plan(baseline, lift, disagreement, alpha, power, 100, weight)
        except planning.PlanError:
            assert baseline + lift >= 1 or disagreement < lift or power <= alpha
            return

        for design in (plan.split, plan.shadow):
            assert all(need.labelled >= need.days >= 1 for need in (design.fixed_sample, design.anytime_valid))
            assert (design.anytime_valid.labelled >= design.anytime_valid_median.labelled) or power < 0.5

    @settings(deadline=None, max_examples=30)
    @given(st.floats(0.002, 0.1), st.floats(1.05, 3))
    def test_is_less_for_a_larger_lift_and_in_pairs_that_seldom_disagree(self, lift, times):
        small, large = (planning.plan(0.6, each, 0.3) for each in (lift, min(lift * times, 0.3)))

        for design in ("split", "shadow"):
            more, less = getattr(small, design), getattr(large, design)
            assert more.fixed_sample.labelled >= less.fixed_sample.labelled
            assert more.anytime_valid.labelled >= less.anytime_valid.labelled
        assert (
            planning.plan(0.6, lift, max(0.2, lift)).shadow.anytime_valid.labelled < small.shadow.anytime_valid.labelled
        )
