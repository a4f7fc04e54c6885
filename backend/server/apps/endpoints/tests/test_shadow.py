"""Shadow tests: the champion answers everyone, and the challenger says what it would have said."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

import pytest
from django.core.management import call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from apps.endpoints import evidence, shadow
from apps.endpoints.models import ABTest, MLRequest, ShadowAnswer
from apps.endpoints.shadow import CHUNK_ROWS, Follower
from apps.ml.registry import registry
from conftest import make_customers, status_of

ABTESTS = "/api/v1/abtests"
PREDICT = "/api/v1/classifier/predict?status=production"
ROWS = make_customers(40, seed=11).drop(columns="IsRetained").to_dict("records")
NOW = timezone.now()


def begin(api, algorithms, **plan) -> ABTest:
    arms = [algorithms["random_forest"].pk, algorithms["decision_tree"].pk]
    body = {"title": "T", "created_by": "Ada", "parent_mlalgorithm_1": arms[0], "parent_mlalgorithm_2": arms[1], **plan}
    response = api.post(ABTESTS, body)
    assert response.status_code == 201, response.content
    return ABTest.objects.get(pk=response.json()["id"])


@pytest.fixture
def test(api, algorithms) -> ABTest:
    """A shadow test of the production algorithm and the decision tree."""
    arms = {
        f"parent_mlalgorithm_{n}": algorithms[key].pk for n, key in enumerate(["random_forest", "decision_tree"], 1)
    }
    response = api.post(ABTESTS, {"title": "Shadow", "created_by": "Ada", "design": "shadow", **arms})
    assert response.status_code == 201, response.content
    return ABTest.objects.get(pk=response.json()["id"])


@pytest.fixture
def challenger(algorithms, test):
    """The challenger's loaded classifier."""
    return registry.get(algorithms["decision_tree"])


def ask(api, rows) -> list[int]:
    response = api.post(PREDICT, rows)
    assert response.status_code == 200, response.content
    return [answer["request_id"] for answer in response.json()]


def plain(rows):
    return [{name: None if value != value else value for name, value in row.items()} for row in rows]


def follow_all(follower: Follower, now: datetime = NOW) -> int:
    total = 0
    while recorded := follower.follow(now):
        total += recorded
    return total


def stop(api, test) -> None:
    assert api.post(f"/api/v1/stop_ab_test/{test.pk}").status_code == 200


def test_the_champion_answers_everyone_and_the_challenger_scores_the_same_rows(api, algorithms, test, challenger):
    ids = ask(api, plain(ROWS))

    assert follow_all(Follower()) == len(ROWS)

    requests = MLRequest.objects.filter(pk__in=ids).select_related("shadow").order_by("pk")
    assert {request.parent_mlalgorithm for request in requests} == {algorithms["random_forest"]}
    assert {request.abtest for request in requests} == {test}
    for request in requests:
        expected = challenger.compute_prediction(request.input_data)
        assert (request.shadow.response, request.shadow.probability) == (expected["label"], expected["probability"])
        assert request.shadow.failure == ""
        assert 0 < request.shadow.latency_ms < 1_000
        assert (request.shadow.abtest, request.shadow.created_at) == (test, NOW)


def test_each_request_is_scored_once_and_what_comes_later_too(api, test, challenger):
    follower = Follower()
    ask(api, plain(ROWS[:3]))
    assert follow_all(follower) == 3
    assert follow_all(follower) == 0

    ask(api, plain(ROWS[3:5]))

    assert follow_all(follower) == 2
    assert follow_all(Follower()) == 0


def test_many_are_scored_in_several_chunks(api, test, challenger, monkeypatch):
    monkeypatch.setattr(shadow, "CHUNK_ROWS", 7)
    ask(api, plain(ROWS))
    follower = Follower()

    assert (follower.follow(NOW), follower.is_behind) == (7, True)
    assert follow_all(follower) == len(ROWS) - 7
    assert not follower.is_behind


def test_rows_that_take_long_are_recorded_before_all_are_scored(api, test, challenger, monkeypatch):
    monkeypatch.setattr(shadow, "CHUNK_SECONDS", -1)
    ask(api, plain(ROWS[:2]))

    assert Follower().follow(NOW) == 0

    monkeypatch.setattr(shadow, "CHUNK_SECONDS", 1)
    assert Follower().follow(NOW) == 2


def test_a_worker_that_is_told_to_stop_begins_no_other_row(api, test, challenger):
    ask(api, plain(ROWS[:2]))

    assert Follower().follow(NOW, is_stopping=lambda: True) == 0


def test_a_request_that_is_committed_after_later_ones_is_found(api, test, challenger):
    first, second = ask(api, plain(ROWS[:2]))
    late = MLRequest.objects.get(pk=first)
    late.delete()
    follower = Follower()
    assert follow_all(follower) == 1

    late.pk = first
    late.save(force_insert=True)
    for seconds in (61, 122, 183):
        follow_all(follower, NOW + timedelta(seconds=seconds))

    assert set(ShadowAnswer.objects.values_list("pk", flat=True)) == {first, second}


def test_and_what_is_settled_is_not_looked_at_again(api, test, challenger):
    follower = Follower()
    for minute in range(6):
        ask(api, plain(ROWS[:3]))
        follow_all(follower, NOW + timedelta(minutes=minute))
        follower.follow(NOW + timedelta(minutes=minute, seconds=30))
    place = follower._places[test.pk]

    assert place.marks[0] > min(MLRequest.objects.values_list("pk", flat=True))


def test_a_row_that_the_challenger_cannot_score_is_a_failure_and_the_others_go_on(api, test, challenger, monkeypatch):
    answers = challenger.compute_prediction

    def compute(row):
        if row["Orders"] == 77:
            raise RuntimeError("no \0 such \ud800 leaf" + "!" * 1_000)
        return answers(row)

    monkeypatch.setattr(challenger, "compute_prediction", compute)
    ask(api, [{"Orders": 3}, {"Orders": 77}, {"Orders": 4}])

    assert follow_all(Follower()) == 3

    good, failed, other = ShadowAnswer.objects.order_by("pk")
    assert (failed.response, failed.probability) == (None, None)
    assert failed.failure.startswith("no  such \\ud800 leaf!!!")
    assert len(failed.failure) < 600
    assert good.response and other.response


@pytest.mark.parametrize("probability", [float("nan"), 1.5])
def test_an_answer_that_is_no_probability_is_a_failure(api, test, challenger, monkeypatch, probability):
    said = {"probability": probability, "label": "1", "status": "OK"}
    monkeypatch.setattr(challenger, "compute_prediction", lambda row: said)
    ask(api, [{"Orders": 3}])

    follow_all(Follower())

    assert ShadowAnswer.objects.get().failure == f"It answered the probability {probability}."


def test_an_answer_that_takes_too_long_is_a_failure(api, test, challenger, settings, monkeypatch):
    settings.SHADOW_TIMEOUT_MS = -1
    ask(api, [{"Orders": 3}])

    follow_all(Follower())

    answer = ShadowAnswer.objects.get()
    assert re.fullmatch(r"It took \d+ ms; the limit is -1 ms\.", answer.failure)
    assert answer.response is None


def test_a_stopped_test_gets_no_more_answers(api, test, challenger):
    ask(api, plain(ROWS[:3]))
    stop(api, test)

    assert follow_all(Follower()) == 0


def test_nor_does_one_that_is_stopped_while_its_rows_are_scored(api, test, challenger, monkeypatch):
    ask(api, plain(ROWS[:3]))
    scored = shadow._scored

    def stopped_meanwhile(*args):
        stop(api, test)
        return scored(*args)

    monkeypatch.setattr(shadow, "_scored", stopped_meanwhile)

    assert Follower().follow(NOW) == 0
    assert not ShadowAnswer.objects.exists()


def test_what_is_scored_while_a_stop_counts_is_dated_after_it_and_does_not_count(api, test, challenger):
    ask(api, plain(ROWS[:5]))
    follow_all(Follower())
    counted_until = timezone.now() + timedelta(minutes=1)
    ABTest.objects.filter(pk=test.pk).update(counted_until=counted_until)
    (late,) = ask(api, plain(ROWS[5:6]))

    follow_all(Follower())

    assert ShadowAnswer.objects.get(request=late).created_at == counted_until + timedelta(microseconds=1)
    counted = evidence.gather(test, counted_until, as_it_stood=True)
    assert (counted.champion.requests, counted.challenger.requests, counted.waiting) == (6, 5, 1)


def test_two_workers_record_nothing_twice_and_the_second_stands_back(api, test, challenger, monkeypatch):
    ask(api, plain(ROWS))
    first, second = Follower(), Follower()
    scored = shadow._scored

    def overtaken(*args):
        monkeypatch.setattr(shadow, "_scored", scored)
        assert first.follow(NOW) == len(ROWS)
        return scored(*args)

    monkeypatch.setattr(shadow, "_scored", overtaken)

    assert second.follow(NOW) == 0
    ask(api, plain(ROWS[:2]))
    assert second.follow(NOW) == 0
    assert second.follow(NOW + timedelta(seconds=11)) == 2
    assert ShadowAnswer.objects.count() == len(ROWS) + 2


def test_a_request_that_is_purged_while_it_is_scored_is_left_out(api, test, challenger, monkeypatch):
    first, second = ask(api, plain(ROWS[:2]))
    scored = shadow._scored

    def purged_meanwhile(*args):
        MLRequest.objects.filter(pk=first).delete()
        return scored(*args)

    monkeypatch.setattr(shadow, "_scored", purged_meanwhile)

    assert Follower().follow(NOW) == 1
    assert ShadowAnswer.objects.get().pk == second


def test_a_challenger_that_cannot_be_loaded_is_said_once_and_catches_up_when_repaired(
    api, algorithms, test, artifacts_dir, settings, caplog
):
    ask(api, plain(ROWS[:3]))
    file = artifacts_dir / algorithms["decision_tree"].artifact
    content = file.read_bytes()
    file.write_bytes(b"broken")
    settings.ML_ARTIFACTS_DIR = artifacts_dir
    registry.clear()
    follower = Follower()

    for second in range(100):
        assert follower.follow(NOW + timedelta(seconds=second)) == 0
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    assert "waits for its challenger" in caplog.text
    assert len(ask(api, plain(ROWS[:1]))) == 1
    file.write_bytes(content)

    assert follow_all(follower, NOW + timedelta(seconds=200)) == 4


def test_the_more_accurate_of_both_on_the_same_customers_goes_to_production(api, algorithms, test, challenger):
    ids = ask(api, plain(ROWS))
    follow_all(Follower())
    for pk, response in ShadowAnswer.objects.values_list("pk", "response"):
        MLRequest.objects.filter(pk=pk).update(feedback=response, labelled_at=NOW)

    stop(api, test)

    assert status_of(algorithms["decision_tree"]) == "production"
    assert f"{len(ids)} of {len(ids)} labelled requests right" in ABTest.objects.get(pk=test.pk).summary


def test_split_tests_have_no_shadow(api, algorithms):
    arms = {
        f"parent_mlalgorithm_{n}": algorithms[key].pk for n, key in enumerate(["random_forest", "decision_tree"], 1)
    }
    assert api.post(ABTESTS, {"title": "Split", "created_by": "Ada", **arms}).status_code == 201
    ask(api, plain(ROWS[:3]))

    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert Follower().follow(NOW) == 0
    assert len(queries) == 1


def test_a_chunk_holds_some_hundreds():
    assert 100 <= CHUNK_ROWS <= 999


def test_a_worker_that_runs_once_scores_what_there_is(api, test, challenger):
    ask(api, plain(ROWS[:3]))

    call_command("batch_worker", once=True)

    assert ShadowAnswer.objects.count() == 3


def test_looking_for_what_is_unscored_reads_no_table_whole(api, test, challenger):
    if connection.vendor != "sqlite":
        pytest.skip("PostgreSQL reads a small table whole, whatever its indexes")
    plans = [shadow._running().explain(), shadow._unscored(test, 5).explain()]

    for plan in plans:
        assert "SCAN endpoints_mlrequest" not in plan
        assert "SCAN endpoints_shadowanswer" not in plan
        assert "request_newest_by_abtest" in plan
