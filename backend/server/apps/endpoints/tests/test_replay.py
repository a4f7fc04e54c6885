"""/api/v1/abtests/replay and `manage.py replay`: what a challenger would have been worth, by the log."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from apps.endpoints.models import MLAlgorithm, MLRequest
from apps.endpoints.replay import said_of_all
from apps.endpoints.shadow import said_of
from apps.ml.registry import registry
from conftest import make_customers

REPLAY = "/api/v1/abtests/replay"
PREDICT = "/api/v1/classifier/predict?status=production"
TABLE = make_customers(300, seed=21)
# None of them is in the table that the models were trained on.
TABLE["CustomerId"] = "N" + TABLE["CustomerId"]
OUTCOMES = TABLE.pop("IsRetained").astype(str).tolist()
ROWS = [{name: None if value != value else value for name, value in row.items()} for row in TABLE.to_dict("records")]


@pytest.fixture
def forest(algorithms) -> MLAlgorithm:
    return algorithms["random_forest"]


@pytest.fixture
def tree(algorithms) -> MLAlgorithm:
    return algorithms["decision_tree"]


def log(api, rows, outcomes) -> list[int]:
    """Let the champion answer, and tell what became of each customer, in that order."""
    response = api.post(PREDICT, rows)
    assert response.status_code == 200, response.content
    ids = [answer["request_id"] for answer in response.json()]
    for pk, outcome in zip(ids, outcomes, strict=True):
        MLRequest.objects.filter(pk=pk).update(feedback=outcome, labelled_at=timezone.now())
    return ids


def ask(api, challenger, **more) -> dict:
    response = api.post(REPLAY, {"challenger": challenger.pk, **more})
    assert response.status_code == 200, response.content
    return response.json()


def refused(api, status=400, **body) -> str:
    response = api.post(REPLAY, body)
    assert response.status_code == status, response.content
    return response.json()["message"]


class TestTheComparison:
    def test_is_that_of_scoring_the_same_rows_by_both(self, api, forest, tree):
        log(api, ROWS, OUTCOMES)
        first, second = (registry.get(each).compute_prediction(ROWS) for each in (forest, tree))
        rights = Counter(
            (one["label"] == outcome, other["label"] == outcome)
            for one, other, outcome in zip(first, second, OUTCOMES, strict=True)
        )

        told = ask(api, tree)

        assert told["pairs"] == {
            "both": rights[True, True],
            "only_champion": rights[True, False],
            "only_challenger": rights[False, True],
            "neither": rights[False, False],
        }
        assert told["considered"] == told["compared"] == len(ROWS)
        assert told["left_out"] == {"immature": 0, "trained_on": 0, "repeated": 0, "failures": 0}
        assert (told["champion"]["id"], told["challenger"]["id"]) == (forest.pk, tree.pk)
        assert told["challenger"]["correct"] == rights[True, True] + rights[False, True]
        assert told["challenger"]["low"] < told["challenger"]["accuracy"] < told["challenger"]["high"]
        difference = told["challenger"]["accuracy"] - told["champion"]["accuracy"]
        assert told["difference"]["estimate"] == pytest.approx(difference)
        assert told["difference"]["low"] < difference < told["difference"]["high"]

    def test_promotes_a_challenger_that_is_much_better_and_says_so(self, api, forest, tree):
        said = [answer["label"] for answer in registry.get(tree).compute_prediction(ROWS)]
        log(api, ROWS, said)

        told = ask(api, tree)

        assert told["challenger"]["accuracy"] == 1
        assert (told["verdict"], told["p"] < 0.05) == ("PROMOTE", True)
        assert told["sentence"].startswith("Promote decision tree 1.0.0: after 300 labelled customers")

    def test_holds_while_labels_are_few(self, api, tree):
        log(api, ROWS[:20], OUTCOMES[:20])

        assert ask(api, tree)["verdict"] == "HOLD"
        assert ask(api, tree, minimum_labelled=20)["verdict"] != "HOLD"

    def test_records_nothing(self, api, tree):
        log(api, ROWS[:20], OUTCOMES[:20])
        before = MLRequest.objects.count()

        ask(api, tree)

        assert MLRequest.objects.count() == before

    def test_goes_by_chunks(self, api, tree, monkeypatch):
        log(api, ROWS, OUTCOMES)
        whole = ask(api, tree)
        monkeypatch.setattr("apps.endpoints.replay.CHUNK_ROWS", 7)

        assert ask(api, tree) == whole


class TestWhoCounts:
    def test_a_customer_counts_once_by_the_outcome_that_was_known_first(self, api, forest, tree):
        first, second, third = log(api, [ROWS[0]] * 3, ["1", "0", "0"])
        now = timezone.now()
        MLRequest.objects.filter(pk=first).update(labelled_at=now)
        MLRequest.objects.filter(pk__in=[second, third]).update(labelled_at=now - timedelta(hours=1))
        label = registry.get(forest).compute_prediction(ROWS[0])["label"]

        told = ask(api, tree)

        assert (told["compared"], told["left_out"]["repeated"]) == (1, 2)
        assert told["champion"]["correct"] == (label == "0")

    def test_requests_without_a_key_count_one_by_one(self, api, tree):
        rows = [{name: value for name, value in ROWS[0].items() if name != "CustomerId"}] * 3
        log(api, rows, ["1", "0", "1"])

        assert ask(api, tree)["compared"] == 3

    def test_only_with_an_outcome_and_of_the_champion(self, api, forest, tree):
        log(api, ROWS[:3], OUTCOMES[:3])
        assert api.post(PREDICT, ROWS[3:6]).status_code == 200
        log_of_other = api.post(f"{PREDICT.split('?')[0]}?status=testing", ROWS[6:9]).json()
        ids = [answer["request_id"] for answer in log_of_other]
        MLRequest.objects.filter(pk__in=ids).update(feedback="1", labelled_at=timezone.now())

        assert ask(api, tree)["considered"] == 3
        assert ask(api, forest, champion=tree.pk)["considered"] == 3

    def test_an_answer_that_is_too_young_does_not(self, api, forest, tree):
        ids = log(api, ROWS[:4], OUTCOMES[:4])
        MLRequest.objects.filter(pk__in=ids[:3]).update(created_at=timezone.now() - timedelta(days=31))

        told = ask(api, tree, maturity_days=30)
        assert (told["considered"], told["compared"], told["left_out"]["immature"]) == (4, 3, 1)

        forest.parent_endpoint.maturity_days = 30
        forest.parent_endpoint.save()
        assert ask(api, tree) == told
        assert ask(api, tree, maturity_days=0)["compared"] == 4

    def test_customers_whom_the_challenger_was_trained_on_do_not(self, api, tree):
        trained_on = sorted(registry.get(tree).run.training_customers)[:5]
        log(api, [{**row, "CustomerId": key} for row, key in zip(ROWS, trained_on, strict=False)], OUTCOMES[:5])
        log(api, ROWS[5:9], OUTCOMES[5:9])

        told = ask(api, tree)

        assert (told["considered"], told["compared"], told["left_out"]["trained_on"]) == (9, 4, 5)
        assert told["training"]["known_by"] == "customer key"
        assert told["training"]["data_sha256"] == registry.get(tree).run.manifest["data"]["sha256"]

    def test_nor_do_answers_from_before_the_training_where_no_key_says_who_it_was(self, api, tree):
        rows = [{name: value for name, value in row.items() if name != "CustomerId"} for row in ROWS[:4]]
        ids = log(api, rows, OUTCOMES[:4])
        trained_at = registry.get(tree).run.trained_at
        MLRequest.objects.filter(pk__in=ids[:3]).update(created_at=trained_at - timedelta(seconds=1))

        told = ask(api, tree)

        assert (told["compared"], told["left_out"]["trained_on"]) == (1, 3)

    def test_nor_where_the_training_table_names_nobody(self, api, forest, tmp_path, settings, artifacts_dir):
        path = tmp_path / "nameless.csv"
        make_customers().drop(columns="CustomerId").to_csv(path, index=False)
        assert train.main(["--data", str(path), "--artifacts-dir", str(artifacts_dir)]) == 0
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        registry.clear()
        challenger = next(each for each in registry.register_run() if each.key == "decision_tree")
        ids = log(api, ROWS[:4], OUTCOMES[:4])
        trained_at = registry.get(challenger).run.trained_at
        MLRequest.objects.filter(pk__in=ids[:3]).update(created_at=trained_at - timedelta(days=1))

        told = ask(api, challenger)

        assert (told["compared"], told["left_out"]["trained_on"]) == (1, 3)
        assert told["training"]["known_by"] == "time"

    def test_a_row_that_the_challenger_cannot_score_is_a_failure(self, api, tree):
        ids = log(api, ROWS[:4], OUTCOMES[:4])
        MLRequest.objects.filter(pk=ids[1]).update(input_data={"Orders": "many"})

        told = ask(api, tree)

        assert (told["compared"], told["left_out"]["failures"]) == (3, 1)

    def test_a_time_can_be_named_and_how_many(self, api, tree):
        ids = log(api, ROWS[:6], OUTCOMES[:6])
        now = timezone.now()
        for days, pk in enumerate(ids):
            MLRequest.objects.filter(pk=pk).update(created_at=now + timedelta(days=days - 100))
        since, until = (now + timedelta(days=days - 100) for days in (2, 5))
        keyed = {"since": since.isoformat(), "until": until.isoformat()}

        assert ask(api, tree, **keyed)["considered"] == 3
        assert ask(api, tree, most=2)["considered"] == 2

    def test_those_of_a_running_tests_champion(self, api, forest, tree):
        arms = {"parent_mlalgorithm_1": tree.pk, "parent_mlalgorithm_2": forest.pk}
        body = {"title": "T", "created_by": "Ada", "design": "shadow", **arms}
        assert api.post("/api/v1/abtests", body).status_code == 201
        log(api, ROWS[:5], OUTCOMES[:5])

        assert ask(api, tree)["champion"]["id"] == forest.pk


class TestRefusals:
    def test_an_unknown_challenger(self, api, algorithms):
        assert "There is no algorithm 999" in refused(api, challenger=999)

    def test_no_challenger(self, api, algorithms):
        assert "challenger" in refused(api)

    def test_the_champion_itself(self, api, forest):
        assert "is the champion itself" in refused(api, challenger=forest.pk)

    def test_one_of_another_endpoint(self, api, forest):
        other = next(each for each in registry.register_run("other") if each.key == "decision_tree")

        assert "of one endpoint" in refused(api, challenger=other.pk, champion=forest.pk)

    def test_nobody_in_production(self, api, forest, tree):
        body = {"status": "testing", "parent_mlalgorithm": forest.pk, "created_by": "Ada"}
        assert api.post("/api/v1/mlalgorithmstatuses", body).status_code == 201

        assert "name the champion" in refused(api, challenger=tree.pk)

    def test_nothing_labelled(self, api, tree):
        assert api.post(PREDICT, ROWS[:3]).status_code == 200

        assert "tell outcomes first" in refused(api, challenger=tree.pk)

    def test_nothing_left_says_why(self, api, tree):
        log(api, ROWS[:3], OUTCOMES[:3])

        assert "3 are younger than 5 days" in refused(api, challenger=tree.pk, maturity_days=5)

    def test_a_challenger_that_cannot_be_loaded(self, api, tree, artifacts_dir, settings):
        (artifacts_dir / tree.artifact).write_bytes(b"broken")
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        registry.clear()

        assert "not available" in refused(api, 503, challenger=tree.pk)

    @pytest.mark.parametrize("bad", [{"alpha": 0}, {"most": 100_001}, {"maturity_days": -1}, {"since": "soon"}])
    def test_a_plan_that_makes_no_sense(self, api, tree, bad):
        assert refused(api, challenger=tree.pk, **bad).startswith(next(iter(bad)))


class TestTheCommand:
    def test_says_what_the_api_says(self, api, tree, capsys):
        log(api, ROWS, OUTCOMES)
        told = ask(api, tree)

        call_command("replay", str(tree.pk), "--since", "2020-01-31")

        said = capsys.readouterr().out
        assert "300 labelled requests of random forest 1.0.0, left out: 0 too young" in said
        assert f"{told['verdict']}: {told['sentence']}" in said

    def test_refuses_in_a_sentence(self, api, forest):
        with pytest.raises(CommandError, match="is the champion itself"):
            call_command("replay", str(forest.pk))

    @pytest.mark.parametrize(
        "options", [["--alpha", "2"], ["--most", "0"], ["--maturity-days", "-1"], ["--until", "soon"]]
    )
    def test_refuses_options_that_make_no_sense(self, db, options):
        with pytest.raises(CommandError, match=options[0]):
            call_command("replay", "1", *options)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-5, 50), st.floats(allow_nan=True), st.text(max_size=3))
NAMES = st.sampled_from(["Plan", "Orders", "RecencyDays", "MeanGapDays", "Newsletter", "Nonsense"])
LOGGED = st.lists(st.dictionaries(NAMES, VALUES, max_size=5), min_size=1, max_size=6)


@given(rows=LOGGED)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_scored_together_as_each_is_by_itself(loaded, rows):
    together, alone = said_of_all(loaded, rows), [said_of(loaded, row) for row in rows]

    def plain(said):
        return said.response, said.probability, said.failure

    assert list(map(plain, together)) == list(map(plain, alone))


@pytest.fixture(scope="module")
def loaded(trained):
    from apps.ml.classifier.random_forest import RandomForestClassifier

    classifier = RandomForestClassifier("1.0.0", trained)
    classifier.load()
    return classifier
