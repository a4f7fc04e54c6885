"""/api/v1/abtests and /api/v1/stop_ab_test: two algorithms share an endpoint's requests, and the better one wins."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime

import pytest
from django.utils import timezone

from apps.endpoints.abtests import Traffic
from apps.endpoints.models import ABTest, Endpoint, MLAlgorithm, MLRequest, ShadowAnswer
from apps.ml.registry import registry
from conftest import status_of

ABTESTS = "/api/v1/abtests"
PREDICT = "/api/v1/classifier/predict"


def begin(api, first: MLAlgorithm, second: MLAlgorithm, **more):
    body = {
        "title": "Forest against tree",
        "created_by": "Ada",
        "parent_mlalgorithm_1": first.pk,
        "parent_mlalgorithm_2": second.pk,
        **more,
    }
    return api.post(ABTESTS, body)


def stop(api, test_id: int) -> dict:
    response = api.post(f"/api/v1/stop_ab_test/{test_id}")
    assert response.status_code == 200, response.content
    return response.json()


def refused(response, status=400) -> str:
    assert response.status_code == status, response.content
    assert response.json()["status"] == "Error"
    return response.json()["message"]


def ask(api, customer, status: str, count: int) -> list[dict]:
    response = api.post(f"{PREDICT}?status={status}", [customer] * count)
    assert response.status_code == 200, response.content
    return response.json()


def tell(api, answer: dict, *, right: bool) -> None:
    outcome = answer["label"] if right else "10"[int(answer["label"])]
    assert api.patch(f"/api/v1/mlrequests/{answer['request_id']}", {"feedback": outcome}).status_code == 200


def tell_about(api, answers: list[dict], algorithm: MLAlgorithm, *, right: int, wrong: int) -> None:
    """Send back outcomes for some of an algorithm's answers."""
    own = [answer for answer in answers if answer["algorithm"] == algorithm.name]
    for number, answer in enumerate(own[: right + wrong]):
        tell(api, answer, right=number < right)
    assert len(own) >= right + wrong


def statuses(algorithms) -> dict[str, str]:
    return {key: status_of(algorithm) for key, algorithm in algorithms.items()}


@pytest.fixture
def forest(algorithms) -> MLAlgorithm:
    """The champion: it holds production."""
    return algorithms["random_forest"]


@pytest.fixture
def extra(algorithms) -> MLAlgorithm:
    return algorithms["extra_trees"]


@pytest.fixture
def tree(algorithms) -> MLAlgorithm:
    return algorithms["decision_tree"]


class TestStarting:
    def test_puts_both_into_ab_testing(self, api, algorithms, forest, tree):
        response = begin(api, forest, tree)

        assert response.status_code == 201
        told = response.json()
        assert set(told) == {
            *("id", "title", "created_by", "created_at", "ended_at", "summary"),
            *("parent_mlalgorithm_1", "parent_mlalgorithm_2", "champion", "challenger"),
            *("design", "policy", "weight", "alpha", "minimum_labelled", "horizon", "maturity_days"),
            *("promote_to", "auto_apply"),
            *("guardrail_error_rate", "guardrail_latency_p99_ms", "guardrail_label_shift"),
            "decision",
        }
        assert (told["title"], told["created_by"]) == ("Forest against tree", "Ada")
        assert (told["parent_mlalgorithm_1"], told["parent_mlalgorithm_2"]) == (forest.pk, tree.pk)
        assert (told["ended_at"], told["summary"]) == (None, "")
        assert statuses(algorithms) == {
            "random_forest": "ab_testing",
            "extra_trees": "staging",
            "decision_tree": "ab_testing",
        }
        assert {entry.created_by for entry in tree.statuses.filter(active=True)} == {"Ada"}

    def test_the_status_history_names_the_test(self, api, forest, tree):
        test = begin(api, forest, tree).json()["id"]
        stop(api, test)

        steps = api.get("/api/v1/mlalgorithmstatuses").json()
        assert [step["reason"] for step in steps if step["parent_mlalgorithm"] == tree.pk][-2:] == [
            f"A/B test {test} began: Forest against tree",
            f"A/B test {test} ended: Forest against tree",
        ]

    def test_a_test_can_be_read_alone_and_in_the_list(self, api, forest, tree, extra):
        first = begin(api, forest, tree).json()
        stop(api, first["id"])
        second = begin(api, extra, tree, title="Again").json()

        listed = api.get(ABTESTS).json()

        assert [row["title"] for row in listed] == ["Forest against tree", "Again"]
        assert listed[1] == second == api.get(f"{ABTESTS}/{second['id']}").json()

    def test_a_form_is_as_good_as_json(self, api, forest, tree):
        body = f"title=T&parent_mlalgorithm_1={forest.pk}&parent_mlalgorithm_2={tree.pk}"

        response = api.post(ABTESTS, body, content_type="application/x-www-form-urlencoded")

        assert response.status_code == 201
        assert response.json()["created_by"] == "anonymous"

    def test_each_endpoint_may_have_one_running_test(self, api, algorithms, forest, tree):
        others = {algorithm.key: algorithm for algorithm in registry.register_run("loyalty")}

        assert begin(api, forest, tree).status_code == 201
        assert begin(api, others["random_forest"], others["decision_tree"]).status_code == 201

    def test_two_versions_of_one_algorithm_may_be_compared(
        self, api, forest, artifacts_dir, customers_csv, settings, customer
    ):
        import train

        settings.ML_ARTIFACTS_DIR = artifacts_dir
        train.main(["--data", str(customers_csv), "--artifacts-dir", str(artifacts_dir), "--version", "2.0.0"])
        newer = next(algorithm for algorithm in registry.register_run() if algorithm.key == "random_forest")

        assert begin(api, forest, newer).status_code == 201
        versions = Counter(answer["version"] for answer in ask(api, customer, "production", 100))
        assert set(versions) == {"1.0.0", "2.0.0"}


class TestThePlan:
    def test_has_defaults_that_are_told(self, api, forest, tree):
        told = begin(api, tree, forest).json()

        assert (told["champion"], told["challenger"]) == (forest.pk, tree.pk)
        assert (told["design"], told["policy"], told["weight"], told["alpha"]) == ("split", "accuracy", 0.5, 0.05)
        assert (told["minimum_labelled"], told["horizon"], told["maturity_days"]) == (100, None, 0)

    def test_is_what_was_asked_for(self, api, extra, tree):
        plan = {
            **{"design": "shadow", "policy": "evidence", "weight": 0.2, "alpha": 0.01, "minimum_labelled": 500},
            **{"horizon": "1 day, 4000 customers", "maturity_days": 30, "promote_to": "production"},
            **{"auto_apply": True, "guardrail_error_rate": None, "guardrail_latency_p99_ms": 20.0},
            "guardrail_label_shift": 0.1,
        }

        told = begin(api, extra, tree, **plan).json()

        assert told == {**told, **plan, "champion": extra.pk, "challenger": tree.pk}

    def test_follows_the_setting_and_the_endpoint_where_nothing_is_asked_for(self, api, forest, tree, settings):
        settings.ABTEST_POLICY = "evidence"
        Endpoint.objects.update(maturity_days=14)

        told = begin(api, forest, tree).json()

        assert (told["policy"], told["maturity_days"]) == ("evidence", 14)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *[("design", value) for value in ("both", "", None, 1)],
            *[("policy", value) for value in ("luck", None)],
            *[("weight", value) for value in (0, 1, -0.5, 1.5, "nan", "half", None)],
            *[("alpha", value) for value in (0, 0.9, "nan", "inf")],
            *[("minimum_labelled", value) for value in (0, -1, 1.5, 10**9, 10**30)],
            *[("horizon", value) for value in ("soon", "0 days", "5", "3 days, 4 days", "-1 days", 30, "9999 days")],
            *[("maturity_days", value) for value in (-1, 10**9, "x")],
            *[("promote_to", value) for value in ("testing", "retired", None)],
            *[("guardrail_error_rate", value) for value in (-0.1, 1.1, "nan")],
            *[("guardrail_latency_p99_ms", value) for value in (0, -5, "inf")],
        ],
    )
    def test_that_makes_no_sense_is_refused_by_the_name_of_the_field(self, api, forest, tree, field, value):
        response = begin(api, forest, tree, **{field: value})

        refused(response)
        assert {error["field"] for error in response.json()["errors"]} == {field}
        assert not ABTest.objects.exists()


class TestACustomer:
    """Whoever has a key is answered by one arm for the life of a test."""

    def arm_of(self, api, customer, key, query="status=ab_testing", **headers) -> str:
        response = api.post(f"{PREDICT}?{query}", {**customer, "CustomerId": key} if key else customer, **headers)
        assert response.status_code == 200, response.content
        return response.json()["algorithm"]

    def test_is_always_answered_by_the_same_arm(self, api, forest, tree, customer):
        begin(api, forest, tree)
        rows = [{**customer, "CustomerId": f"C{number}"} for number in range(60)]

        first = [answer["algorithm"] for answer in api.post(f"{PREDICT}?status=production", rows).json()]
        registry.clear()
        again = [answer["algorithm"] for answer in api.post(f"{PREDICT}?status=ab_testing", rows[::-1]).json()]

        assert set(first) == {"random forest", "decision tree"}
        assert first == again[::-1]
        assert first == [self.arm_of(api, customer, row["CustomerId"]) for row in rows]

    def test_may_be_named_by_the_header(self, api, forest, tree, customer):
        test = begin(api, forest, tree).json()["id"]
        keys = [f"C{number}" for number in range(40)]

        by_body = [self.arm_of(api, customer, key) for key in keys]
        by_header = [self.arm_of(api, customer, None, headers={"X-Customer-Key": f" {key} "}) for key in keys]
        by_form = [
            api.post(
                f"{PREDICT}?status=ab_testing",
                f"Orders=4&CustomerId={key}",
                content_type="application/x-www-form-urlencoded",
            ).json()["algorithm"]
            for key in keys
        ]

        assert by_body == by_header == by_form
        assert MLRequest.objects.filter(abtest=test, customer_key="C7").count() == 3

    def test_whose_key_is_a_number_is_the_one_whose_key_is_its_text(self, api, forest, tree, customer):
        begin(api, forest, tree)

        for number in range(1, 30):
            assert self.arm_of(api, customer, float(number)) == self.arm_of(api, customer, str(number))

    def test_is_put_into_an_arm_anew_in_each_test(self, api, forest, tree, customer):
        def arms():
            test = begin(api, forest, tree).json()["id"]
            found = [self.arm_of(api, customer, f"C{number}") for number in range(40)]
            stop(api, test)
            api.post("/api/v1/mlalgorithmstatuses", {"status": "production", "parent_mlalgorithm": forest.pk})
            return found

        assert arms() != arms()

    @pytest.mark.parametrize("share", [0.1, 0.8])
    def test_goes_to_the_challenger_as_often_as_the_weight_says(self, api, forest, tree, customer, share):
        begin(api, tree, forest, weight=share)
        rows = [{**customer, "CustomerId": number} for number in range(1000)]

        keyed = Counter(answer["algorithm"] for answer in api.post(f"{PREDICT}?status=production", rows).json())
        keyless = Counter(answer["algorithm"] for answer in ask(api, customer, "production", 1000))

        for counts in (keyed, keyless):  # five standard deviations
            assert abs(counts["decision tree"] - 1000 * share) < 5 * (1000 * share * (1 - share)) ** 0.5

    def test_named_twice_must_be_the_same(self, api, algorithms, customer):
        for key, header in [("C1", "C1"), (42, "42")]:
            assert self.arm_of(api, customer, key, "status=production", headers={"X-Customer-Key": header})

        response = api.post(PREDICT, {**customer, "CustomerId": "C1"}, headers={"X-Customer-Key": "C2"})

        assert refused(response) == (
            "X-Customer-Key is 'C2' and CustomerId is 'C1': send one of them, or the same in both."
        )

    def test_named_beside_a_list_of_several_is_refused(self, api, algorithms, customer):
        message = refused(api.post(PREDICT, [customer] * 2, headers={"X-Customer-Key": "C1"}))

        assert "X-Customer-Key names one customer, and the body has 2" in message
        assert api.post(PREDICT, [customer], headers={"X-Customer-Key": "C1"}).status_code == 200

    def test_whose_key_is_too_long_is_refused(self, api, algorithms, customer):
        assert "X-Customer-Key is longer than" in refused(
            api.post(PREDICT, customer, headers={"X-Customer-Key": "x" * 500})
        )

    def test_whose_key_in_a_test_is_none_is_refused_as_elsewhere(self, api, forest, tree, customer):
        begin(api, forest, tree)

        for bad in ({**customer, "CustomerId": ["C1"]}, "C1"):
            response = api.post(f"{PREDICT}?status=ab_testing", [customer, bad])

            refused(response)
            assert [error["row"] for error in response.json()["errors"]] == [2]


class TestAChallengerThatFails:
    """In a split test: the champion answers in its place, and the failure counts."""

    @pytest.fixture
    def test(self, api, forest, tree) -> ABTest:
        begin(api, forest, tree, policy="evidence")
        return ABTest.objects.get()

    @staticmethod
    def rows(customer, count: int = 40) -> list[dict]:
        return [{**customer, "CustomerId": f"C{number}"} for number in range(count)]

    @staticmethod
    def of_challenger(test: ABTest, rows: list[dict]) -> list[int]:
        traffic = Traffic(test.pk, test.design, test.salt, test.weight)
        return [place for place, row in enumerate(rows) if traffic.asks_challenger(row["CustomerId"])]

    @pytest.fixture
    def fails(self, tree, test, monkeypatch):
        def fail(row: object) -> None:
            raise OSError("no \x00such \ud800 leaf")

        monkeypatch.setattr(registry.get(tree), "compute_prediction", fail)

    @pytest.fixture
    def is_broken(self, algorithms, test, artifacts_dir, settings):
        file = artifacts_dir / algorithms["decision_tree"].artifact
        file.write_bytes(b"broken")
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        registry.clear()

    def test_while_it_scores_harms_no_answer_and_each_failure_counts(self, api, test, customer, fails):
        rows = self.rows(customer)
        meant = self.of_challenger(test, rows)

        answers = api.post(f"{PREDICT}?status=production", rows).json()
        single = api.post(f"{PREDICT}?status=production", rows[meant[0]]).json()

        assert {answer["algorithm"] for answer in [*answers, single]} == {"random forest"}
        failed = [answers[place]["request_id"] for place in meant] + [single["request_id"]]
        assert [*ShadowAnswer.objects.order_by("pk").values_list("pk", flat=True)] == failed
        assert {*ShadowAnswer.objects.values_list("failure", flat=True)} == {"no such \\ud800 leaf"}
        assert not MLRequest.objects.filter(pk__in=failed, abtest=test).exists()
        assert MLRequest.objects.filter(abtest=test).count() == len(rows) - len(meant)

    def test_that_cannot_be_loaded_leaves_its_customers_to_the_champion(self, api, test, customer, is_broken):
        rows = self.rows(customer)
        meant = self.of_challenger(test, rows)

        answers = api.post(f"{PREDICT}?status=production", rows).json()

        assert {answer["algorithm"] for answer in answers} == {"random forest"}
        assert MLRequest.objects.filter(abtest=test).count() == len(rows) - len(meant)
        assert ShadowAnswer.objects.filter(abtest=test, response=None).count() == len(meant)
        assert "decision tree 1.0.0 is not available" in ShadowAnswer.objects.first().failure

    def test_breaks_the_guardrail_and_is_taken_out(self, api, test, customer, tree, fails):
        rows = self.rows(customer, 300)
        api.post(f"{PREDICT}?status=production", rows)
        failures = len(self.of_challenger(test, rows))

        report = api.get(f"{ABTESTS}/{test.pk}/report").json()
        stopped = stop(api, test.pk)

        assert (report["challenger"]["requests"], report["challenger"]["failures"]) == (0, failures)
        assert report["champion"]["failures"] == 0
        assert report["decision"]["verdict"] == "ROLLBACK"
        assert f"it failed in 100.0% of {failures} requests, where 5.0% are allowed" in stopped["message"]
        assert status_of(tree) == "testing"

    def test_at_some_rows_answers_the_others_itself(self, api, test, customer, tree, monkeypatch):
        rows = self.rows(customer)
        hard, *easy = self.of_challenger(test, rows)
        rows[hard]["Orders"] = 77
        classifier = registry.get(tree)
        answers = classifier.compute_prediction

        def fail_at_some(asked):
            if any(row["Orders"] == 77 for row in asked):
                raise RuntimeError("no such leaf")
            return answers(asked)

        monkeypatch.setattr(classifier, "compute_prediction", fail_at_some)

        told = api.post(f"{PREDICT}?status=production", rows).json()

        assert told[hard]["algorithm"] == "random forest"
        assert {told[place]["algorithm"] for place in easy} == {"decision tree"}
        assert ShadowAnswer.objects.get().pk == told[hard]["request_id"]

    @pytest.mark.parametrize(
        "nonsense", [{"probability": float("nan")}, {"probability": 2.0}, {"probability": None}, {"label": "stay"}]
    )
    def test_by_answering_nonsense(self, api, test, customer, tree, monkeypatch, nonsense):
        classifier = registry.get(tree)
        answers = classifier.compute_prediction
        monkeypatch.setattr(
            classifier, "compute_prediction", lambda rows: [{**answer, **nonsense} for answer in answers(rows)]
        )
        rows = self.rows(customer)

        told = api.post(f"{PREDICT}?status=production", rows).json()

        assert {answer["algorithm"] for answer in told} == {"random forest"}
        assert ShadowAnswer.objects.count() == len(self.of_challenger(test, rows))
        assert ShadowAnswer.objects.first().failure.startswith("It answered the ")

    def test_a_row_that_nobody_can_read_is_no_failure(self, api, test, customer):
        rows = [{**row, "Orders": "many"} for row in self.rows(customer)]

        message = refused(api.post(f"{PREDICT}?status=production", rows))

        assert "Orders" in message
        assert not ShadowAnswer.objects.exists()
        assert not MLRequest.objects.exists()


class TestWhatCannotBeStarted:
    @pytest.fixture(autouse=True)
    def nothing_changes(self, algorithms):
        before = statuses(algorithms), ABTest.objects.count()
        yield
        assert (statuses(algorithms), ABTest.objects.count()) == before

    def test_one_algorithm_against_itself(self, api, forest):
        assert "two different algorithms" in refused(begin(api, forest, forest))

    def test_algorithms_of_two_endpoints(self, api, forest):
        other = registry.register_run("loyalty")[0]

        message = refused(begin(api, forest, other))

        assert "one endpoint; random forest 1.0.0 belongs to classifier, random forest 1.0.0 to loyalty" in message

    @pytest.mark.parametrize("algorithm", [0, -1, 999_999, 10**30, 1.5, True, None, "", "forest", [], {}])
    def test_an_algorithm_that_does_not_exist(self, api, forest, algorithm):
        for number in (1, 2):
            response = begin(api, forest, forest, **{f"parent_mlalgorithm_{number}": algorithm})

            refused(response)
            assert response.json()["errors"][0]["field"] == f"parent_mlalgorithm_{number}"

    @pytest.mark.parametrize("title", ["", "  ", None, "x" * 201, "\x00", "\ud800", [], {}])
    def test_a_title_that_is_none(self, api, forest, tree, title):
        body = {"title": title, "parent_mlalgorithm_1": forest.pk, "parent_mlalgorithm_2": tree.pk}

        response = api.generic("POST", ABTESTS, json.dumps(body), content_type="application/json")

        refused(response)
        assert response.json()["errors"][0]["field"] == "title"

    @pytest.mark.parametrize("body", ["", "{}", "[]", "5", "null", "[{}]", '{"title": 1e999}'])
    def test_what_is_no_object(self, api, algorithms, body):
        refused(api.generic("POST", ABTESTS, body, content_type="application/json"))


class TestWhatCannotBeStartedNow:
    def test_a_second_test_on_an_endpoint(self, api, algorithms, forest, tree, extra):
        running = begin(api, forest, tree).json()["id"]

        for first, second in [(forest, tree), (tree, extra), (extra, forest)]:
            message = refused(begin(api, first, second))
            assert f"stop it first with POST /api/v1/stop_ab_test/{running}" in message
        assert status_of(extra) == "staging"

    def test_a_retired_algorithm(self, api, forest, tree):
        api.post("/api/v1/mlalgorithmstatuses", {"status": "retired", "parent_mlalgorithm": tree.pk})

        assert "decision tree 1.0.0 is retired" in refused(begin(api, forest, tree))
        assert status_of(forest) == "production"

    def test_an_algorithm_whose_artifact_is_damaged(self, api, forest, tree, artifacts_dir, settings):
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        (artifacts_dir / "1.0.0" / "decision_tree.joblib").write_bytes(b"damaged")
        registry.clear()

        message = refused(begin(api, forest, tree))

        assert message.startswith("decision tree 1.0.0 cannot answer a test's requests: ")
        assert status_of(forest) == "production"


class TestWhileItRuns:
    def test_the_status_ab_testing_is_split_evenly_over_the_two(self, api, forest, tree, customer):
        test = begin(api, forest, tree).json()["id"]

        counts = Counter(answer["algorithm"] for answer in ask(api, customer, "ab_testing", 1000))

        assert set(counts) == {"random forest", "decision tree"}
        assert 400 < counts["random forest"] < 600  # six standard deviations
        assert MLRequest.objects.filter(abtest=test).count() == 1000

    def test_so_are_single_requests(self, api, forest, tree, customer):
        begin(api, forest, tree)

        answers = [api.post(f"{PREDICT}?status=ab_testing", customer).json() for _ in range(40)]

        assert {answer["algorithm"] for answer in answers} == {"random forest", "decision tree"}

    def test_production_is_split_too_when_one_of_the_two_held_it(self, api, forest, tree, customer):
        test = begin(api, tree, forest).json()["id"]

        answers = ask(api, customer, "production", 200)

        assert {answer["algorithm"] for answer in answers} == {"random forest", "decision tree"}
        assert MLRequest.objects.filter(abtest=test).count() == 200

    def test_production_is_served_by_its_holder_when_neither_of_the_two_held_it(self, api, extra, tree, customer):
        begin(api, extra, tree)

        assert {answer["algorithm"] for answer in ask(api, customer, "production", 50)} == {"random forest"}
        assert not MLRequest.objects.exclude(abtest=None).exists()

    def test_each_answer_is_the_one_of_the_algorithm_it_names(self, api, forest, tree, customer):
        begin(api, forest, tree)
        customers = [{**customer, "RecencyDays": days} for days in range(0, 350, 5)]

        answers = api.post(f"{PREDICT}?status=ab_testing", customers).json()

        by_name = {algorithm.name: registry.get(algorithm) for algorithm in (forest, tree)}
        assert [answer["probability"] for answer in answers] == [
            by_name[answer["algorithm"]].compute_prediction(row)["probability"]
            for answer, row in zip(answers, customers, strict=True)
        ]
        ids = [answer["request_id"] for answer in answers]
        assert ids == sorted(ids)
        logged = MLRequest.objects.in_bulk(ids)
        assert [logged[pk].input_data for pk in ids] == customers

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("algorithm=random_forest", "random forest"),
            ("status=production&algorithm=random_forest", "random forest"),
            ("status=ab_testing&algorithm=decision_tree", "decision tree"),
            ("status=production&version=1.0.0", "random forest"),
            ("status=staging", "extra trees"),
        ],
    )
    def test_who_names_an_algorithm_or_another_status_gets_that_one_outside_the_test(
        self, api, forest, tree, customer, query, expected
    ):
        begin(api, forest, tree)

        answers = api.post(f"{PREDICT}?{query}", [customer] * 30).json()

        assert {answer["algorithm"] for answer in answers} == {expected}
        assert not MLRequest.objects.exclude(abtest=None).exists()

    def test_the_status_that_a_tested_algorithm_had_is_not_served(self, api, forest, tree, customer):
        begin(api, forest, tree)

        message = refused(api.post(f"{PREDICT}?status=testing", customer))

        assert "status=ab_testing&algorithm=decision_tree&version=1.0.0" in message

    def test_the_version_alone_names_several_and_is_refused_with_them(self, api, forest, tree, customer):
        begin(api, forest, tree)

        assert "3 algorithms fit version=1.0.0" in refused(api.post(f"{PREDICT}?version=1.0.0", customer))

    def test_a_list_with_bad_rows_is_refused_whole_whichever_algorithm_they_fell_to(self, api, forest, tree, customer):
        begin(api, forest, tree)
        rows = [{**customer, "Orders": "four"} if number % 3 == 0 else customer for number in range(30)]

        response = api.post(f"{PREDICT}?status=ab_testing", rows)

        refused(response)
        assert [error["row"] for error in response.json()["errors"]] == list(range(1, 31, 3))
        assert not MLRequest.objects.exists()

    def test_a_prediction_costs_no_query_more(self, api, forest, tree, customer, django_assert_num_queries):
        begin(api, forest, tree)
        api.post(f"{PREDICT}?status=production", customer)

        with django_assert_num_queries(2):
            api.post(f"{PREDICT}?status=production", customer)

    @pytest.mark.parametrize(
        ("broken", "answering"), [("decision_tree", "random forest"), ("random_forest", "decision tree")]
    )
    def test_an_arm_that_cannot_be_loaded_any_more_breaks_no_caller(
        self, api, forest, tree, customer, artifacts_dir, settings, broken, answering
    ):
        begin(api, forest, tree)
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        (artifacts_dir / "1.0.0" / f"{broken}.joblib").write_bytes(b"damaged")
        registry.clear()

        answers = ask(api, customer, "production", 12)

        assert {answer["algorithm"] for answer in answers} == {answering}
        logged = MLRequest.objects.filter(pk__in=[answer["request_id"] for answer in answers])
        in_test = logged.exclude(abtest=None).count()
        # Customers of the champion stay in the test without the challenger; without the champion there is none.
        assert in_test == (12 - ShadowAnswer.objects.count() if broken == "decision_tree" else 0)


class TestStopping:
    def test_promotes_the_more_accurate_and_returns_the_other_to_testing(self, api, algorithms, forest, tree, customer):
        test = begin(api, forest, tree).json()["id"]
        answers = ask(api, customer, "production", 60)
        tell_about(api, answers, tree, right=6, wrong=2)
        tell_about(api, answers, forest, right=5, wrong=5)

        told = stop(api, test)

        assert statuses(algorithms) == {
            "random_forest": "testing",
            "extra_trees": "staging",
            "decision_tree": "production",
        }
        assert told["summary"] == (
            "random forest 1.0.0: 5 of 10 labelled requests right (accuracy 0.5000). "
            "decision tree 1.0.0: 6 of 8 labelled requests right (accuracy 0.7500). "
            "decision tree 1.0.0 is the more accurate and goes to production. "
            "Not yet supported by the evidence: p = 1, about 270 more labels would settle it. Stopped by anonymous."
        )
        assert told["message"] == f"The test is stopped. {told['summary']}"
        assert timezone.now() >= datetime.fromisoformat(told["ended_at"]) > datetime.fromisoformat(told["created_at"])
        assert {name: told[name] for name in told if name != "message"} == api.get(f"{ABTESTS}/{test}").json()
        assert {answer["algorithm"] for answer in ask(api, customer, "production", 20)} == {"decision tree"}

    def test_keeps_the_champion_when_it_is_the_more_accurate(self, api, algorithms, forest, tree, customer):
        test = begin(api, tree, forest).json()["id"]
        answers = ask(api, customer, "production", 60)
        tell_about(api, answers, tree, right=1, wrong=4)
        tell_about(api, answers, forest, right=3, wrong=1)

        stop(api, test)

        assert (status_of(forest), status_of(tree)) == ("production", "testing")

    @pytest.mark.parametrize(
        ("of_forest", "of_tree", "reason"),
        [
            ((2, 2), (3, 3), "Both are equally accurate: random forest 1.0.0 keeps production."),
            ((0, 3), (0, 1), "Both are equally accurate: random forest 1.0.0 keeps production."),
            ((0, 0), (0, 0), "There are not enough labels to compare: random forest 1.0.0 keeps production."),
            ((0, 3), (0, 0), "There are not enough labels to compare: random forest 1.0.0 keeps production."),
            ((0, 0), (5, 0), "There are not enough labels to compare: random forest 1.0.0 keeps production."),
        ],
    )
    def test_a_tie_or_missing_labels_keep_the_champion(self, api, forest, tree, customer, of_forest, of_tree, reason):
        test = begin(api, tree, forest).json()["id"]
        answers = ask(api, customer, "production", 60)
        tell_about(api, answers, forest, right=of_forest[0], wrong=of_forest[1])
        tell_about(api, answers, tree, right=of_tree[0], wrong=of_tree[1])

        assert reason in stop(api, test)["summary"]
        assert (status_of(forest), status_of(tree)) == ("production", "testing")

    def test_without_a_champion_the_winner_displaces_whoever_holds_production(
        self, api, algorithms, extra, tree, customer
    ):
        test = begin(api, extra, tree).json()["id"]
        tell_about(api, answers := ask(api, customer, "ab_testing", 60), tree, right=2, wrong=1)
        tell_about(api, answers, extra, right=1, wrong=2)

        stop(api, test)

        assert statuses(algorithms) == {
            "random_forest": "staging",
            "extra_trees": "testing",
            "decision_tree": "production",
        }

    def test_without_a_champion_a_tie_leaves_production_as_it_is(self, api, algorithms, extra, tree, customer):
        test = begin(api, extra, tree).json()["id"]

        summary = stop(api, test)["summary"]

        assert "neither held production when the test began: production stays as it is." in summary
        assert statuses(algorithms) == {
            "random_forest": "production",
            "extra_trees": "testing",
            "decision_tree": "testing",
        }

    def test_only_labelled_requests_of_the_test_count(self, api, forest, tree, customer):
        before = ask(api, customer, "production", 5)
        test = begin(api, forest, tree).json()["id"]
        outside = api.post(f"{PREDICT}?algorithm=decision_tree", [customer] * 9).json()
        for answer in before + outside:
            tell(api, answer, right=answer["algorithm"] == "decision tree")
        inside = ask(api, customer, "production", 60)
        tell_about(api, inside, forest, right=1, wrong=0)
        tell_about(api, inside, tree, right=0, wrong=1)

        summary = stop(api, test)["summary"]

        assert "random forest 1.0.0: 1 of 1 labelled requests right" in summary
        assert "decision tree 1.0.0: 0 of 1 labelled requests right" in summary
        assert status_of(forest) == "production"

    def test_a_corrected_outcome_counts_as_corrected(self, api, forest, tree, customer):
        test = begin(api, forest, tree).json()["id"]
        answers = ask(api, customer, "production", 60)
        tell_about(api, answers, tree, right=4, wrong=0)
        tell_about(api, answers, tree, right=1, wrong=3)
        tell_about(api, answers, forest, right=2, wrong=2)

        assert "decision tree 1.0.0: 1 of 4" in stop(api, test)["summary"]
        assert status_of(forest) == "production"

    def test_twice_answers_200_says_so_and_changes_nothing(self, api, algorithms, forest, tree, customer):
        test = begin(api, forest, tree).json()["id"]
        answers = ask(api, customer, "production", 60)
        first = stop(api, test)
        tell_about(api, answers, tree, right=3, wrong=0)
        tell_about(api, answers, forest, right=0, wrong=3)
        held = statuses(algorithms)

        second = stop(api, test)

        assert second["message"].startswith("The test had been stopped at ")
        assert first["summary"] in second["message"]
        assert {**second, "message": None} == {**first, "message": None}
        assert statuses(algorithms) == held

    def test_what_the_test_logged_stays(self, api, forest, tree, customer):
        test = begin(api, forest, tree).json()["id"]
        ask(api, customer, "production", 10)

        stop(api, test)

        assert len(api.get(f"/api/v1/mlrequests?abtest={test}").json()["results"]) == 10
        assert ABTest.objects.filter(pk=test).exists()
        assert [entry.status for entry in tree.statuses.order_by("id")] == ["testing", "ab_testing", "testing"]

    def test_after_it_another_test_may_start(self, api, forest, tree, extra):
        stop(api, begin(api, forest, tree).json()["id"])

        assert begin(api, forest, extra).status_code == 201

    @pytest.mark.parametrize("pk", ["0", "999999", "9" * 30, "9" * 5000, "-1", "x", "1.0"])
    def test_a_test_that_does_not_exist_is_404(self, api, algorithms, pk):
        refused(api.post(f"/api/v1/stop_ab_test/{pk}"), 404)
        refused(api.get(f"{ABTESTS}/{pk}"), 404)

    def test_it_is_posted_not_read(self, api, forest, tree):
        test = begin(api, forest, tree).json()["id"]

        response = api.get(f"/api/v1/stop_ab_test/{test}")

        refused(response, 405)
        assert response["Allow"] == "POST, OPTIONS"
        for method in ("put", "patch", "delete"):
            refused(getattr(api, method)(f"{ABTESTS}/{test}", {"title": "Mine"}), 405)
