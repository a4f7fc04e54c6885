"""GET /api/v1/abtests/{id}/report and what a test is stopped on: a verdict that rests on customers' real outcomes."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from importlib import import_module
from io import StringIO

import pytest
from django.apps import apps
from django.core.management import CommandError, call_command
from django.db import IntegrityError, InternalError, OperationalError, connection, transaction
from django.http import HttpResponse
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from apps.endpoints import abtests, charts, evidence, kept_reports
from apps.endpoints.models import ABTest, Decision, Endpoint, FeedbackChange, KeptReport, MLRequest, ShadowAnswer
from apps.endpoints.purge import running_tests_of
from apps.endpoints.report import report as report_of
from apps.endpoints.statistics import split_difference
from conftest import status_of

ABTESTS = "/api/v1/abtests"
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def champion(algorithms):
    return algorithms["random_forest"]


@pytest.fixture
def challenger(algorithms):
    return algorithms["extra_trees"]


def begin(api, champion, challenger, **plan) -> ABTest:
    body = {"title": "T", "parent_mlalgorithm_1": champion.pk, "parent_mlalgorithm_2": challenger.pk, **plan}
    response = api.post(ABTESTS, {"policy": "evidence", **body})
    assert response.status_code == 201, response.content
    ABTest.objects.update(created_at=BEGAN)
    return ABTest.objects.get(pk=response.json()["id"])


def log(
    test: ABTest, algorithm, count: int, correct: int, *, unknown: int = 0, key: str = "", **more
) -> list[MLRequest]:
    """Requests of customers of their own, one a minute, whose outcome came a day later; and some without one."""
    start = MLRequest.objects.count()
    rows = []
    for number in range(count + unknown):
        asked = BEGAN + timedelta(minutes=start + number)
        is_known = number < count
        rows.append(
            MLRequest(
                **{
                    "input_data": {},
                    "full_response": {},
                    "response": "1",
                    "probability": 0.8,
                    "feedback": ("1" if number < correct else "0") if is_known else None,
                    "labelled_at": asked + timedelta(days=1) if is_known else None,
                    "created_at": asked,
                    "latency_ms": 1.0 + number % 100,
                    "customer_key": f"{algorithm.key}-{start + number}",
                    "parent_mlalgorithm": algorithm,
                    "abtest": test,
                    **more,
                }
            )
        )
    return MLRequest.objects.bulk_create(rows)


def shadow(requests: list[MLRequest], test: ABTest, right: int) -> None:
    """The challenger's answers: right for the first so many."""
    for number, request in enumerate(requests):
        label = request.feedback if number < right else "10"[int(request.feedback)]
        ShadowAnswer.objects.create(request=request, abtest=test, response=label, probability=0.7, latency_ms=2.0)


def report(api, test) -> dict:
    response = api.get(f"{ABTESTS}/{test.pk}/report")
    assert response.status_code == 200, response.content
    return response.json()


def evaluated() -> str:
    call_command("evaluate_abtests", stdout=(said := StringIO()))
    return said.getvalue()


def recomputed(test: ABTest) -> str:
    call_command("recompute_decision", str(test.pk), stdout=(said := StringIO()))
    return said.getvalue()


def stop(api, test, **body) -> dict:
    response = api.post(f"/api/v1/stop_ab_test/{test.pk}", body)
    assert response.status_code == 200, response.content
    return response.json()


class TestAReport:
    def test_of_a_test_without_requests_says_to_wait(self, api, champion, challenger):
        for design in ("split", "shadow"):
            test = begin(api, champion, challenger, design=design)

            told = report(api, test)

            assert told["decision"]["verdict"] == "HOLD"
            assert told["difference"]["estimate"] is None
            assert told["days"] == []
            stop(api, test)

    def test_counts_by_arm(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 300, 240, unknown=100)
        log(test, challenger, 200, 170, unknown=200)

        told = report(api, test)

        first, second = told["champion"], told["challenger"]
        assert (first["customers"], first["labelled"], first["label_rate"], first["accuracy"]) == (400, 300, 0.75, 0.8)
        assert (second["customers"], second["labelled"], second["accuracy"]) == (400, 200, 0.85)
        assert first["latency_ms"] == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
        assert first["mean_probability"] == pytest.approx(0.8)
        assert first["brier"] == pytest.approx(0.8 * 0.04 + 0.2 * 0.64)
        assert first["roc_auc"] == 0.5
        assert first["calibration"] == [{"mean_probability": pytest.approx(0.8), "stayed": 0.8, "customers": 300}]
        expected = split_difference(240, 300, 170, 200, 0.05)
        assert told["difference"]["estimate"] == pytest.approx(0.05)
        assert told["difference"]["interval"] == pytest.approx([expected.low, expected.high])
        assert told["difference"]["p"] == pytest.approx(expected.p)
        assert told["days"][-1]["labelled"] == [300, 200]
        assert (
            told["decision"]["verdict"] == "INVALID"
        )  # of the champion's customers 75% are labelled, of the other's 50%

    def test_ranks_by_the_probability(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        for probability, feedback in [(0.9, "1"), (0.8, "0"), (0.7, "1"), (0.2, "0"), (0.7, "0")]:
            log(test, champion, 1, 1, probability=probability, feedback=feedback)

        assert report(api, test)["champion"]["roc_auc"] == pytest.approx((3 + 1.5) / 6)

    def test_counts_a_customer_once_by_the_first_outcome_that_became_known(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        first, second, third = log(test, champion, 3, 3, customer_key="C1")
        MLRequest.objects.filter(pk=first.pk).update(feedback="0", labelled_at=BEGAN + timedelta(days=9))
        MLRequest.objects.filter(pk=second.pk).update(labelled_at=BEGAN + timedelta(days=3))
        MLRequest.objects.filter(pk=third.pk).update(feedback="0", labelled_at=BEGAN + timedelta(days=4))
        log(test, champion, 2, 1, customer_key="")

        told = report(api, test)["champion"]

        assert (told["requests"], told["customers"], told["labelled"]) == (5, 3, 3)
        assert told["accuracy"] == pytest.approx(2 / 3)

    def test_leaves_out_what_was_answered_before_the_test(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 5, 5, abtest=None, customer_key="C1")
        log(test, champion, 1, 0, customer_key="C1")

        told = report(api, test)["champion"]

        assert (told["customers"], told["labelled"], told["accuracy"]) == (1, 1, 0.0)

    def test_counts_an_outcome_when_the_answer_is_mature(self, api, champion, challenger):
        test = begin(api, champion, challenger, maturity_days=30)
        log(test, champion, 10, 5)
        log(test, champion, 10, 5, created_at=timezone.now() - timedelta(days=29), labelled_at=timezone.now())

        told = report(api, test)

        assert (told["champion"]["customers"], told["champion"]["labelled"]) == (20, 10)
        assert [day["labelled"] for day in told["days"]][-1] == [10, 0]
        assert told["days"][1]["day"] == "2026-01-31"

    def test_whom_early_evidence_was_for_is_not_forgotten(self, api, champion, challenger):
        test = begin(api, champion, challenger, design="shadow")
        lost, won = log(test, champion, 60, 60), log(test, champion, 100, 0)
        shadow(lost, test, right=0)
        shadow(won, test, right=0)
        ShadowAnswer.objects.filter(request__in=won).update(response="0")

        told = report(api, test)

        assert told["difference"]["p"] < 0.001  # the champion alone was right sixty times in a row
        assert told["difference"]["estimate"] > 0  # and then the challenger a hundred times
        assert told["decision"]["verdict"] == "CONTINUE"

    def test_of_a_shadow_has_the_pairs(self, api, champion, challenger):
        test = begin(api, champion, challenger, design="shadow")
        requests = log(test, champion, 200, 150, unknown=10)
        shadow(requests[:200], test, right=180)

        told = report(api, test)

        assert told["pairs"] == {"both": 150, "only_champion": 0, "only_challenger": 30, "neither": 20}
        assert told["challenger"]["accuracy"] == 0.9
        assert told["decision"]["verdict"] == "PROMOTE"
        assert told["waiting"] == 10
        assert told["checks"] == {"sample_ratio": None, "label_rate": None}


@pytest.mark.parametrize("design", ["split", "shadow"])
def test_the_database_counts_so_a_larger_test_takes_no_more_statements(api, champion, challenger, design):
    test = begin(api, champion, challenger, design=design)

    def grow(count: int) -> None:
        requests = log(test, champion, count, count // 2)
        if design == "shadow":
            shadow(requests, test, count // 3)

    def statements() -> list[str]:
        with CaptureQueriesContext(connection) as queries:
            report(api, test)
        return [query["sql"] for query in queries]

    grow(10)
    few = statements()
    grow(1000)

    assert len(statements()) == len(few) <= 24


class TestAReportOfALargeTest:
    @pytest.fixture
    def large(self, api, champion, challenger, monkeypatch) -> ABTest:
        """A test of ten requests, where that is many."""
        monkeypatch.setattr(kept_reports, "LARGE", 9)
        test = begin(api, champion, challenger)
        log(test, champion, 10, 5)
        return test

    def test_is_shown_again_until_somebody_asks_for_a_fresh_one(self, api, champion, large):
        first = report(api, large)
        log(large, champion, 10, 5)

        assert report(api, large) == first
        fresh = api.get(f"{ABTESTS}/{large.pk}/report", {"fresh": "true"}).json()
        assert (first["champion"]["requests"], fresh["champion"]["requests"]) == (10, 20)
        assert fresh["as_of"] > first["as_of"]
        assert report(api, large) == fresh

    def test_is_shown_again_as_a_picture_too(self, api, champion, large):
        def picture(**query) -> bytes:
            return api.get(f"{ABTESTS}/{large.pk}/report.png", query).content

        first = picture()
        log(large, champion, 10, 5)

        assert picture() == first
        assert picture(fresh="true") != first

    def test_is_counted_anew_from_its_page(self, api, admin_client, champion, large):
        page = f"/admin/endpoints/abtest/{large.pk}/report/"
        link = '<a class="text-link" href="?fresh=true">Count anew</a>'
        assert link not in admin_client.get(page).content.decode()
        log(large, champion, 10, 5)
        assert link in admin_client.get(page).content.decode()

        fresh = admin_client.get(page, {"fresh": "true"})

        assert ["Requests", "20", "0"] in fresh.context["report"]["tables"][0]["rows"]
        assert link not in fresh.content.decode()
        assert f"/admin/endpoints/abtest/{large.pk}/report.png?fresh=true" in fresh.content.decode()
        slide = admin_client.get(f"/admin/endpoints/abtest/{large.pk}/report.png")
        log(large, champion, 10, 5)
        assert admin_client.get(slide.request["PATH_INFO"]).content == slide.content
        assert admin_client.get(slide.request["PATH_INFO"], {"fresh": "true"}).content != slide.content

    def test_tells_at_once_that_it_has_ended(self, api, admin_client, large):
        running = report(api, large)
        stop(api, large)

        ended = report(api, large)

        assert (running["ended_at"], ended["as_of"]) == (None, ended["ended_at"])
        page = admin_client.get(f"/admin/endpoints/abtest/{large.pk}/report/").content.decode()
        assert "How it ended:" in page and "Count anew" not in page

    def test_is_told_without_reading_the_log(self, api, large):
        report(api, large)

        with CaptureQueriesContext(connection) as asked:
            report(api, large)

        assert not [query["sql"] for query in asked if "mlrequest" in query["sql"]]

    def test_is_counted_by_who_looks_where_no_worker_has_done_so_for_long(self, champion, large):
        now = timezone.now()
        kept_reports.look(large, now=now)
        log(large, champion, 10, 5)

        assert kept_reports.look(large, now=now + timedelta(minutes=10))["as_of"] == now
        later = kept_reports.look(large, now=now + timedelta(minutes=11))
        assert (later["champion"]["requests"], later["as_of"]) == (20, now + timedelta(minutes=11))

    def test_gives_no_way_to_an_older_one_that_took_longer(self, large):
        now = timezone.now()
        kept_reports.look(large, now=now, fresh=True)
        kept_reports.look(large, now=now - timedelta(minutes=1), fresh=True)

        assert kept_reports.look(large, now=now + timedelta(minutes=1))["as_of"] == now

    def test_tells_the_same_when_it_was_kept(self, api, champion, challenger, large):
        log(large, challenger, 190, 150)
        log(large, champion, 180, 100)

        def told(what: str, **query) -> HttpResponse:
            return api.get(f"{ABTESTS}/{large.pk}/{what}", query)

        assert told("report.png", fresh="true").content == told("report.png").content
        fresh = told("report", fresh="true").json()
        assert told("report").json() == fresh
        assert fresh["difference"]["interval"]

    def test_of_another_release_is_not_shown(self, api, champion, large):
        report(api, large)
        KeptReport.objects.update(format=kept_reports.FORMAT + 1, document={"of": "another form"})
        log(large, champion, 10, 5)

        assert report(api, large)["champion"]["requests"] == 20
        stop(api, large)
        assert kept_reports.keep_up(timezone.now() + timedelta(minutes=10))
        KeptReport.objects.update(format=kept_reports.FORMAT + 1)
        assert kept_reports.keep_up(timezone.now() + timedelta(minutes=20))

    def test_has_the_form_that_its_number_stands_for(self, api, challenger, large):
        """When this fails, raise FORMAT too: what an older release has kept calls things otherwise, or lacks them."""
        log(large, challenger, 200, 150)
        report(api, large)

        names = sorted({*names_in(KeptReport.objects.get().document)})
        assert (kept_reports.FORMAT, sha256(" ".join(names).encode()).hexdigest()[:8]) == (1, "08ee6eec")

    def test_counted_by_a_clock_that_is_ahead_gives_way(self, api, champion, large):
        now = timezone.now()
        kept_reports.look(large, now=now + timedelta(days=300))
        log(large, champion, 10, 5)

        assert report(api, large)["champion"]["requests"] == 20
        assert kept_reports.look(large, now=now + timedelta(minutes=1))["champion"]["requests"] == 20
        KeptReport.objects.update(begun_at=now + timedelta(days=300))
        assert kept_reports.keep_up(now)

    def test_is_told_also_when_it_cannot_be_kept(self, api, large):
        def refuse(execute, sql, *more):
            if "keptreport" in sql and not sql.startswith("SELECT"):
                raise OperationalError("attempt to write a readonly database")
            return execute(sql, *more)

        with connection.execute_wrapper(refuse):
            assert report(api, large)["champion"]["requests"] == 10
        assert not KeptReport.objects.exists()

    def test_goes_not_back_in_time_when_the_log_is_purged(self, api, large):
        report(api, large)
        MLRequest.objects.filter(pk__in=MLRequest.objects.values("pk")[:5]).delete()

        assert api.get(f"{ABTESTS}/{large.pk}/report", {"fresh": "true"}).json()["champion"]["requests"] == 5
        assert report(api, large)["champion"]["requests"] == 5

    def test_is_counted_by_a_worker_before_anyone_looks(self, api, champion, large):
        call_command("batch_worker", once=True)
        log(large, champion, 10, 5)

        assert report(api, large)["champion"]["requests"] == 10

    def test_is_counted_anew_by_a_worker_every_few_minutes(self, large):
        now = timezone.now()

        counted = [kept_reports.keep_up(now + timedelta(minutes=minutes)) for minutes in range(12)]

        assert [minute for minute, has in enumerate(counted) if has] == [0, 6]

    def test_is_counted_less_often_the_longer_it_takes(self, champion, large):
        now = timezone.now()
        kept_reports.keep_up(now)
        KeptReport.objects.update(seconds=60)
        log(large, champion, 10, 5)

        counted = [kept_reports.keep_up(now + timedelta(minutes=minutes)) for minutes in (6, 20, 21)]
        assert counted == [False, False, True]
        KeptReport.objects.update(seconds=60)
        shown = [kept_reports.look(large, now=now + timedelta(minutes=minutes))["as_of"] for minutes in (61, 62)]
        assert shown == [now + timedelta(minutes=21), now + timedelta(minutes=62)]

    def test_is_left_to_the_worker_that_counts_it(self, large):
        now = timezone.now()
        KeptReport.objects.create(abtest=large, begun_at=now)

        assert not kept_reports.keep_up(now + timedelta(minutes=5))
        assert kept_reports.keep_up(now + timedelta(minutes=6))

    @pytest.mark.parametrize("lately", [False, True])
    def test_is_counted_by_one_of_two_workers_that_look_at_once(self, large, lately):
        """The other one looks after this one has seen that it is due, and before it says that it counts."""
        now = timezone.now()
        if lately:
            kept_reports.keep_up(now - timedelta(minutes=10))
        counted = []

        def after_another(execute, sql, *more):
            if sql.startswith("UPDATE") and "keptreport" in sql and not counted:
                counted.append(None)
                counted.append(kept_reports.keep_up(now))
            return execute(sql, *more)

        with connection.execute_wrapper(after_another):
            counted.append(kept_reports.keep_up(now))

        assert counted == [None, True, False]

    def test_that_fails_keeps_no_other_waiting(self, api, champion, challenger, large, monkeypatch):
        other = ABTest.objects.create(
            title="Fails",
            parent_mlalgorithm_1=champion,
            parent_mlalgorithm_2=challenger,
            parent_endpoint=Endpoint.objects.create(name="other", owner="Ada"),
            created_at=BEGAN,
        )
        log(other, champion, 10, 5)
        counted = []

        def count(execute, sql, *more):
            if "TABLE evidence_asked AS" in sql:
                counted.append(int(re.search(r"abtest_id = (\d+)", sql)[1]))
                if counted[-1] == other.pk:
                    raise OperationalError("It cannot be counted.")
            return execute(sql, *more)

        now = timezone.now()
        with connection.execute_wrapper(count):
            for minute in range(24):
                with suppress(OperationalError):
                    kept_reports.keep_up(now + timedelta(minutes=minute))

        assert {*counted} == {large.pk, other.pk}
        assert counted == counted[:2] * 4

    def test_is_counted_by_a_worker_once_it_has_ended_and_once_more_when_all_is_in(self, api, champion, large):
        kept_reports.keep_up(timezone.now())
        stop(api, large)
        large.refresh_from_db()
        ended = large.ended_at

        minutes = [-2, -1, 0.5, 1, 5, 6, 7, 60]
        counted = [kept_reports.keep_up(ended + timedelta(minutes=later)) for later in minutes]
        assert [minute for minute, has in zip(minutes, counted, strict=True) if has] == [-2, 5]

        MLRequest.objects.filter(abtest=large).delete()
        told = kept_reports.look(large, now=ended + timedelta(days=400))
        assert (told["as_of"], told["ended_at"], told["champion"]["requests"]) == (ended, ended, 10)

    @pytest.mark.parametrize(("hours", "is_counted"), [(23, True), (25, False)])
    def test_is_left_to_who_looks_when_it_ended_long_ago(self, api, large, hours, is_counted):
        stop(api, large)

        assert kept_reports.keep_up(timezone.now() + timedelta(hours=hours)) is is_counted

    def test_of_before_its_end_is_not_shown_after_it_though_it_was_counted_later(self, api, large):
        running = ABTest.objects.get(pk=large.pk)
        stop(api, large)
        kept_reports.look(running, now=timezone.now() + timedelta(seconds=30), fresh=True)

        assert report(api, large)["ended_at"] is not None
        assert kept_reports.keep_up(timezone.now() + timedelta(minutes=10))

    def test_is_as_fresh_as_can_be_when_the_test_is_small(self, api, champion, challenger, large, monkeypatch):
        monkeypatch.setattr(kept_reports, "LARGE", 10)
        report(api, large)
        assert not kept_reports.keep_up(timezone.now())
        log(large, champion, 1, 1)
        assert report(api, large)["champion"]["requests"] == 11
        stop(api, large)
        of_a_shadow = begin(api, champion, challenger, design="shadow")
        shadow(log(of_a_shadow, champion, 10, 5), of_a_shadow, right=5)
        report(api, of_a_shadow)
        log(of_a_shadow, champion, 1, 1)

        assert report(api, of_a_shadow)["champion"]["requests"] == 11

    @pytest.mark.parametrize("what", ["report", "report.png"])
    def test_is_refused_for_an_unclear_wish(self, api, large, what):
        response = api.get(f"{ABTESTS}/{large.pk}/{what}", {"fresh": "perhaps"})

        assert response.status_code == 400
        assert [error["field"] for error in response.json()["errors"]] == ["fresh"]


class TestThePicture:
    """GET /api/v1/abtests/{id}/report.png."""

    def test_is_a_slide(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        for algorithm, correct in ((champion, 120), (challenger, 150)):
            log(test, algorithm, 200, correct, unknown=10)

        response = api.get(f"{ABTESTS}/{test.pk}/report.png")

        assert response["Content-Type"] == "image/png"
        assert response["Content-Disposition"] == f'inline; filename="abtest-{test.pk}.png"'
        assert size_of(response.content) == (1920, 1080)

    def test_is_drawn_from_the_evidence(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        empty = api.get(f"{ABTESTS}/{test.pk}/report.png").content
        log(test, champion, 1, 1)
        log(test, challenger, 1, 0)
        few = api.get(f"{ABTESTS}/{test.pk}/report.png").content
        for algorithm in (champion, challenger):
            log(test, algorithm, 3000, 2000, probability=0.4)
        many = api.get(f"{ABTESTS}/{test.pk}/report.png").content

        assert len({empty, few, many}) == 3
        assert {size_of(picture) for picture in (empty, few, many)} == {(1920, 1080)}

    def test_says_how_the_test_was_ended(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 200, 100)
        running = report_of(test, now=timezone.now())
        ended = {**running, "ended_at": timezone.now(), "summary": "Overruled by ada."}

        assert charts.slide(ended) != charts.slide(running)
        assert charts.slide({**ended, "summary": "A long story. " * 200}).startswith(b"\x89PNG")

    @pytest.mark.parametrize("title", ["$\\frac{1}{2", "a" * 200, "客户 🙂", "<script>"])
    def test_takes_any_title(self, api, champion, challenger, title):
        test = begin(api, champion, challenger, title=title, design="shadow")
        shadow(log(test, champion, 200, 150), test, 160)

        assert size_of(api.get(f"{ABTESTS}/{test.pk}/report.png").content) == (1920, 1080)

    def test_is_drawn_for_several_at_once(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 50, 40)
        told = report_of(test, now=timezone.now())

        with ThreadPoolExecutor(4) as several:
            pictures = set(several.map(lambda _: charts.slide(told), range(8)))

        assert len(pictures) == 1


def names_in(document: object, within: str = "") -> Iterator[str]:
    if isinstance(document, dict):
        for name, value in document.items():
            yield f"{within}.{name}"
            yield from names_in(value, f"{within}.{name}")
    elif isinstance(document, list):
        for value in document:
            yield from names_in(value, within)


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


class TestTheFirstRuleThatApplies:
    def test_a_split_that_is_broken_is_invalid(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 600, 300)
        log(test, challenger, 400, 390)

        told = report(api, test)

        assert told["decision"]["verdict"] == "INVALID"
        assert "600 customers came to random forest 1.0.0 and 400 to extra trees 1.0.0" in told["decision"]["sentence"]
        assert told["checks"]["sample_ratio"]["single_look_p"] == pytest.approx(2.54e-10, rel=0.01)

    def test_weights_other_than_even_are_no_broken_split(self, api, champion, challenger):
        test = begin(api, champion, challenger, weight=0.4)
        log(test, champion, 600, 300)
        log(test, challenger, 400, 200)

        assert report(api, test)["decision"]["verdict"] == "CONTINUE"

    @pytest.mark.parametrize(
        ("of_champion", "of_challenger", "plan", "expected"),
        [
            ((99, 50), (99, 90), {}, "HOLD"),
            ((99, 50), (99, 90), {"horizon": "5 days"}, "PROMOTE"),
            ((99, 50), (0, 0), {"horizon": "5 days"}, "INVALID"),
            ((400, 300), (400, 380), {}, "PROMOTE"),
            ((400, 380), (400, 300), {}, "KEEP"),
            ((400, 300), (400, 305), {}, "CONTINUE"),
            ((400, 300), (400, 305), {"horizon": "800 customers"}, "KEEP"),
            ((400, 300), (400, 305), {"horizon": "801 customers"}, "CONTINUE"),
            ((400, 400), (400, 400), {}, "CONTINUE"),
            ((400, 400), (400, 0), {}, "KEEP"),
        ],
    )
    def test_decides_a_split(self, api, champion, challenger, of_champion, of_challenger, plan, expected):
        test = begin(api, champion, challenger, **plan)
        log(test, champion, *of_champion)
        log(test, challenger, *of_challenger)

        assert report(api, test)["decision"]["verdict"] == expected

    def test_a_manager_reads_what_would_settle_it(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 200, 160)
        log(test, challenger, 212, 172)

        sentence = report(api, test)["decision"]["sentence"]

        assert sentence.startswith(
            "Keep random forest 1.0.0: after 412 labelled customers the challenger is not shown to be better "
            "(81.1% right against 80.0%; difference +1.1 points, 95% interval "
        )
        assert sentence.endswith("more are expected to settle it.")

    @pytest.mark.parametrize(
        ("plan", "why"),
        [
            ({"guardrail_latency_p99_ms": 50}, "its p99 latency is 99.0 ms, where 50 ms are allowed"),
            ({"guardrail_label_shift": 0.2}, "where a difference of 20 points is allowed"),
        ],
    )
    def test_a_guardrail_that_broke_comes_before_all_else(self, api, champion, challenger, plan, why):
        test = begin(api, champion, challenger, policy="accuracy", **plan)
        log(test, champion, 200, 100)
        log(test, challenger, 200, 190)
        some = list(MLRequest.objects.filter(parent_mlalgorithm=champion).values_list("pk", flat=True)[:60])
        MLRequest.objects.filter(pk__in=some).update(response="0")

        assert report(api, test)["decision"]["verdict"] == "ROLLBACK"
        told = stop(api, test)

        assert why in told["summary"]
        assert (status_of(champion), status_of(challenger)) == ("production", "testing")

    def test_a_challenger_that_fails_breaks_a_guardrail(self, api, champion, challenger):
        test = begin(api, champion, challenger, design="shadow")
        requests = log(test, champion, 200, 150)
        shadow(requests[:180], test, right=180)
        for request in requests[180:]:
            ShadowAnswer.objects.create(request=request, abtest=test, latency_ms=1, failure="no")

        assert "it failed in 10.0% of 200 requests" in report(api, test)["decision"]["sentence"]


class TestWhatTheChallengerOfASplitCannotAnswer:
    def test_counts_as_wrong_so_that_no_model_looks_better_for_it(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 5000, 4000)
        log(test, challenger, 4600, 4000)
        left = log(test, champion, 400, 200, key="hard", abtest=None)
        fail(test, left)

        told = report(api, test)

        assert told["challenger"]["accuracy"] == 4000 / 5000
        assert [told[arm]["customers"] for arm in ("champion", "challenger")] == [5000, 5000]
        assert (told["challenger"]["requests"], told["challenger"]["failures"]) == (4600, 400)
        assert told["challenger"]["mean_probability"] == pytest.approx(0.8)
        assert told["difference"]["estimate"] == 0
        assert told["decision"]["warnings"] == [
            "extra trees 1.0.0 could not answer 400 of its requests. The champion answered them, "
            "and they count as wrong."
        ]

    def test_is_seen_by_whoever_purges(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        fail(test, log(test, champion, 1, 1, abtest=None))

        assert running_tests_of(MLRequest.objects.all()) == [test]


def fail(test: ABTest, requests: list[MLRequest]) -> None:
    ShadowAnswer.objects.bulk_create(
        ShadowAnswer(request=one, abtest=test, failure="no such leaf", latency_ms=0, created_at=one.created_at)
        for one in requests
    )


class TestActingOnAPrediction:
    def test_the_verdict_rests_on_whom_nobody_treated_when_they_are_enough(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        for algorithm, right in ((champion, 150), (challenger, 100)):
            log(test, algorithm, 200, right)
            log(test, algorithm, 50, 0, acted_on=True)

        told = report(api, test)

        assert told["judged_on"] == "untreated"
        assert (told["champion"]["accuracy"], told["champion"]["labelled"]) == (0.75, 250)
        assert told["champion"]["treated"] == {"labelled": 50, "accuracy": 0.0}
        assert told["decision"]["warnings"] == []

    def test_it_warns_when_most_were_treated(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        for algorithm in (champion, challenger):
            log(test, algorithm, 50, 40)
            log(test, algorithm, 200, 100, acted_on=True)

        told = report(api, test)

        assert told["judged_on"] == "everyone"
        assert "Something was done for 80% of the labelled customers" in told["decision"]["warnings"][0]


class TestStoppingByTheEvidence:
    def test_promotes_a_challenger_that_is_shown_to_be_better(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 400, 300)
        log(test, challenger, 400, 380)

        told = stop(api, test)

        assert (status_of(champion), status_of(challenger)) == ("staging", "production")
        decision = told["decision"]
        assert (decision["verdict"], decision["promoted"], decision["promoted_to"]) == (
            "PROMOTE",
            challenger.pk,
            "production",
        )
        assert decision == api.get(f"{ABTESTS}/{test.pk}").json()["decision"]

    def test_leaves_the_champion_where_it_was_otherwise(self, api, algorithms, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 400, 300)
        log(test, challenger, 400, 310)

        told = stop(api, test)

        assert told["decision"]["verdict"] == "CONTINUE"
        assert (status_of(champion), status_of(challenger)) == ("production", "testing")

    @pytest.mark.parametrize("target", ["staging", "production"])
    def test_a_winner_of_two_that_did_not_hold_production_goes_where_the_plan_says(
        self, api, algorithms, champion, challenger, target
    ):
        tree = algorithms["decision_tree"]
        test = begin(api, challenger, tree, promote_to=target)
        log(test, challenger, 400, 300)
        log(test, tree, 400, 380)

        stop(api, test)

        assert (status_of(tree), status_of(challenger)) == (target, "staging")
        assert status_of(champion) == ("production" if target == "staging" else "staging")

    def test_a_person_may_overrule_it_for_a_reason_that_is_kept(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        log(test, champion, 400, 300)
        log(test, challenger, 400, 310)
        without = api.post(f"/api/v1/stop_ab_test/{test.pk}", {"force": True})
        assert without.status_code == 400
        assert "takes a reason" in without.json()["message"]

        told = stop(api, test, force=True, reason="The champion's data source ends.")

        assert (status_of(champion), status_of(challenger)) == ("staging", "production")
        assert (told["decision"]["verdict"], told["decision"]["forced"]) == ("CONTINUE", True)
        assert told["decision"]["reason"] == "The champion's data source ends."
        assert "in favour of extra trees 1.0.0: The champion's data source ends." in told["summary"]

    def test_a_shadow_ends_by_the_accuracy_rule_too(self, api, champion, challenger):
        test = begin(api, champion, challenger, design="shadow", policy="accuracy")
        requests = log(test, champion, 20, 10)
        shadow(requests, test, right=12)

        told = stop(api, test)

        assert status_of(challenger) == "production"
        assert "extra trees 1.0.0: 12 of 20 labelled requests right" in told["summary"]
        assert "Not yet supported by the evidence: p = " in told["summary"]


class TestEvaluating:
    """manage.py evaluate_abtests"""

    @pytest.mark.parametrize("auto_apply", [True, False])
    def test_stops_what_is_settled_if_that_was_planned(self, api, champion, challenger, auto_apply):
        test = begin(api, champion, challenger, auto_apply=auto_apply)
        log(test, champion, 400, 300)
        log(test, challenger, 400, 380)

        said = evaluated()

        assert f"{test.pk}, T: PROMOTE. Promote extra trees 1.0.0: after 800 labelled customers" in said
        assert ("The test is stopped." in said) is auto_apply
        assert status_of(challenger) == ("production" if auto_apply else "ab_testing")

    def test_counts_once_what_it_says_and_does(self, api, champion, challenger):
        test = begin(api, champion, challenger, auto_apply=True)
        log(test, champion, 400, 300)
        log(test, challenger, 400, 380)

        with CaptureQueriesContext(connection) as queries:
            evaluated()

        counts = [query for query in queries if query["sql"].startswith("CREATE TEMPORARY TABLE evidence_asked")]
        assert len(counts) == 1
        assert Decision.objects.get().verdict == "PROMOTE"

    def test_leaves_alone_what_is_open(self, api, champion, challenger):
        test = begin(api, champion, challenger, auto_apply=True)
        log(test, champion, 10, 5)

        assert "HOLD. Wait: there are 0 of the 100 labelled customers that each arm needs." in evaluated()
        assert ABTest.objects.running().filter(pk=test.pk).exists()

    def test_of_no_test_says_nothing(self, api, champion):
        assert evaluated() == ""


class TestWhileAStopCounts:
    """Nobody waits for it, and nothing that is told meanwhile counts."""

    def stop_while(self, test: ABTest, do: Callable[[], None], now: datetime) -> ABTest:
        def before_it_reads(execute, sql, *details):
            if sql.startswith("CREATE TEMPORARY TABLE evidence_asked"):
                do()
            return execute(sql, *details)

        with connection.execute_wrapper(before_it_reads):
            ended, ended_now = abtests.stop(test, by="Ada", now=now)
        assert ended_now
        return ended

    @pytest.mark.parametrize("policy", ["accuracy", "evidence"])
    @pytest.mark.parametrize("design", ["split", "shadow"])
    def test_what_is_told_by_a_clock_that_is_behind_is_dated_after_it(self, api, champion, challenger, design, policy):
        test = begin(api, champion, challenger, design=design, policy=policy)
        requests = log(test, champion, 0, 0, unknown=25)
        if design == "shadow":
            for request in requests:
                ShadowAnswer.objects.create(request=request, abtest=test, response="1", probability=0.7, latency_ms=2.0)

        def tell(some: list[MLRequest], outcome: str) -> None:
            outcomes = [{"request_id": request.pk, "outcome": outcome} for request in some]
            assert api.post("/api/v1/feedback", outcomes).status_code == 200

        tell(requests[:15], "1")
        tell(requests[15:20], "0")
        ahead = timezone.now() + timedelta(minutes=1)

        ended = self.stop_while(test, lambda: tell(requests[10:15] + requests[20:], "0"), ahead)

        late = FeedbackChange.objects.order_by("pk").values_list("created_at", flat=True)[20:]
        assert len(late) == 10 and set(late) == {ahead + timedelta(microseconds=1)}
        assert (ended.ended_at, ended.decision.decided_at) == (ahead, ahead)
        told = report(api, test)["champion"]
        assert (told["labelled"], told["accuracy"]) == (20, 0.75)
        assert ("15 of 20 labelled requests right" in ended.summary) is (policy == "accuracy")
        of_the_other = {"labelled": 20, "correct": 15} if design == "shadow" else {"labelled": 0, "correct": 0}
        assert ended.decision.evidence["by_request"] == [{"labelled": 20, "correct": 15}, of_the_other]
        assert "The same as recorded" in recomputed(test)

    def test_what_a_shadow_was_told_by_a_clock_that_is_ahead_counts(self, api, champion, challenger):
        test = begin(api, champion, challenger, design="shadow")
        shadow(log(test, champion, 20, 15), test, right=20)
        ahead = timezone.now() + timedelta(minutes=1)
        ShadowAnswer.objects.update(created_at=ahead)

        stop(api, test)

        test.refresh_from_db()
        assert (test.decision.decided_at, test.decision.evidence["pairs"]["both"]) == (ahead, 15)
        assert "The same as recorded" in recomputed(test)

    def test_a_later_stop_counts_no_less_than_one_that_did_not_end_it(self, api, champion, challenger):
        test = begin(api, champion, challenger)
        ahead = timezone.now() + timedelta(minutes=1)
        ABTest.objects.filter(pk=test.pk).update(counted_until=ahead)

        stop(api, test)

        assert Decision.objects.get().decided_at == ahead


class TestADecision:
    def stopped(self, api, champion, challenger) -> ABTest:
        test = begin(api, champion, challenger, design="shadow")
        requests = log(test, champion, 200, 150)
        shadow(requests, test, right=180)
        stop(api, test)
        test.refresh_from_db()
        return test

    def test_can_be_made_again_from_the_log_as_it_stood(self, api, champion, challenger):
        test = self.stopped(api, champion, challenger)
        recorded = test.decision.evidence
        for request in MLRequest.objects.filter(abtest=test)[:30]:
            later = test.decision.decided_at + timedelta(days=1)
            FeedbackChange.objects.create(
                request=request, previous=None, feedback=request.feedback, created_at=BEGAN, created_by="x"
            )
            changed = "10"[int(request.feedback)]
            FeedbackChange.objects.create(
                request=request, previous=request.feedback, feedback=changed, created_at=later, created_by="x"
            )
            MLRequest.objects.filter(pk=request.pk).update(feedback=changed, acted_on=True)

        assert "The same as recorded: PROMOTE" in recomputed(test)
        assert report(api, test)["pairs"] == recorded["pairs"]
        now = evidence.gather(test, later, only_for_verdict=True)
        assert asdict(now.pairs) != recorded["pairs"]

    def test_that_cannot_be_made_again_says_what_differs(self, api, champion, challenger):
        test = self.stopped(api, champion, challenger)
        MLRequest.objects.filter(abtest=test)[0].delete()

        with pytest.raises(CommandError, match=r"differs:[\s\S]*pairs: recorded .* now "):
            recomputed(test)

    def test_of_a_test_without_one_cannot_be_made_again(self, api, champion, challenger):
        with pytest.raises(CommandError, match="has no decision"):
            recomputed(begin(api, champion, challenger))

    def test_of_before_counts_had_a_moment_is_dated_so_that_it_can_be_made_again(self, api, champion, challenger):
        test = self.stopped(api, champion, challenger)
        ShadowAnswer.objects.update(created_at=test.ended_at + timedelta(seconds=3))
        ABTest.objects.update(counted_until=None)
        running = begin(api, champion, challenger)

        import_module("apps.endpoints.migrations.0006_count_before_a_stop").ended_tests_counted_until_their_end(
            apps, None
        )

        assert "The same as recorded" in recomputed(test)
        assert dict(ABTest.objects.values_list("pk", "counted_until")) == {test.pk: test.ended_at, running.pk: None}

    def test_is_never_changed(self, api, champion, challenger):
        if connection.vendor not in ("sqlite", "postgresql"):
            pytest.skip("only these two guard it")
        test = self.stopped(api, champion, challenger)

        with pytest.raises((IntegrityError, InternalError)), transaction.atomic():
            Decision.objects.filter(abtest=test).update(verdict="KEEP")
