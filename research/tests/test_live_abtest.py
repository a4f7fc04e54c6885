"""Who may be asked about in a live test, and what its outcome may be said to show."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import live_abtest
import train
from tests.postgresql import free_port

ONE_TREE = {"decision_tree": train.MODELS["decision_tree"]}


def members(rows, first=0, columns=("Visits",)):
    random = np.random.default_rng(first)
    visits = random.integers(0, 9, rows)
    return pd.DataFrame(
        {
            "MemberKey": [f"M{number}" for number in range(first, first + rows)],
            **dict.fromkeys(columns, visits),
            "Stayed": np.where(random.random(rows) < visits / 9, "yes", "no"),
        }
    )


@pytest.fixture
def run(tmp_path):
    """Trains a version on a table of members; returns the file."""

    def make(version, frame):
        path = tmp_path / f"{version}.csv"
        frame.to_csv(path, index=False)
        table = train.load_table(path, "Stayed")
        train.train(table, version=version, directory=tmp_path / "artifacts", resamples=5, models=ONE_TREE)
        return path

    make.directory = tmp_path / "artifacts"
    return make


def algorithm(number, status, version="1.0.0"):
    return {"id": number, "name": f"model {number}", "version": version, "current_status": status}


def test_production_meets_the_newest_in_staging():
    known = [algorithm(1, "testing"), algorithm(2, "staging"), algorithm(3, "production"), algorithm(4, "staging")]
    champion, challenger = live_abtest.contestants(known)
    assert (champion["id"], challenger["id"]) == (3, 4)


def test_production_meets_the_newest_in_testing_when_nothing_is_staged():
    known = [algorithm(1, "testing"), algorithm(2, "testing"), algorithm(3, "production"), algorithm(4, "retired")]
    assert live_abtest.contestants(known)[1]["id"] == 2


def test_a_challenger_can_be_named():
    known = [algorithm(1, "testing"), algorithm(2, "staging"), algorithm(3, "production")]
    assert live_abtest.contestants(known, challenger=1)[1]["id"] == 1


@pytest.mark.parametrize(
    ("known", "sentence"),
    [
        ([algorithm(1, "staging")], "No algorithm is in production"),
        ([algorithm(1, "ab_testing"), algorithm(2, "ab_testing")], "stop the A/B test that is running"),
        ([algorithm(1, "production"), algorithm(2, "retired")], "give one the status staging"),
    ],
)
def test_without_two_algorithms_there_is_no_test(known, sentence):
    with pytest.raises(live_abtest.Refused, match=sentence):
        live_abtest.contestants(known)


def test_customers_of_either_training_run_are_left_out(run):
    first, second = members(100), members(100, first=50)
    run("1.0.0", first)
    path = run("1.1.0", second)
    arms = [algorithm(1, "production", "1.0.0"), algorithm(2, "staging", "1.1.0")]
    held = live_abtest.held_out(arms, run.directory, path, most=1000)
    seen = set()
    for version in ("1.0.0", "1.1.0"):
        seen |= live_abtest.open_run(run.directory, version).training_customers
    outcomes = dict(zip(second["MemberKey"], second["Stayed"], strict=True))
    assert {one.row["MemberKey"] for one in held} == set(second["MemberKey"]) - seen
    assert all(one.outcome == outcomes[one.row["MemberKey"]] for one in held)
    assert all(set(one.row) == {"MemberKey", "Visits"} for one in held)


def test_no_more_customers_are_taken_than_asked_for_and_the_same_each_time(run):
    path = run("1.0.0", members(100))
    arms = [algorithm(1, "production"), algorithm(2, "staging")]
    taken = live_abtest.held_out(arms, run.directory, path, most=7)
    assert len(taken) == 7
    assert taken == live_abtest.held_out(arms, run.directory, path, most=7)
    assert taken != live_abtest.held_out(arms, run.directory, path, most=7, seed=1)


def test_a_file_of_training_customers_alone_is_refused(run, tmp_path):
    frame = members(100)
    run("1.0.0", frame)
    seen = live_abtest.open_run(run.directory, "1.0.0").training_customers
    path = tmp_path / "seen.csv"
    frame[frame["MemberKey"].isin(seen)].to_csv(path, index=False)
    with pytest.raises(live_abtest.Refused, match=r"Every customer of seen\.csv was trained on"):
        live_abtest.held_out([algorithm(1, "production")], run.directory, path, most=10)


def test_a_table_that_names_nobody_holds_nobody_out(run):
    path = run("1.0.0", members(100).drop(columns="MemberKey"))
    with pytest.raises(live_abtest.Refused, match="names no customer"):
        live_abtest.held_out([algorithm(1, "production")], run.directory, path, most=10)


def test_models_of_different_columns_cannot_be_compared_on_one_row(run):
    run("1.0.0", members(100))
    path = run("2.0.0", members(100, columns=("Visits", "Calls")))
    with pytest.raises(live_abtest.Refused, match="different columns"):
        arms = [algorithm(1, "production", "1.0.0"), algorithm(2, "staging", "2.0.0")]
        live_abtest.held_out(arms, run.directory, path, most=10)


def test_an_artifacts_folder_that_is_not_the_servers_is_told_so(run, tmp_path):
    path = run("1.0.0", members(100))
    with pytest.raises(live_abtest.Refused, match="Set ML_ARTIFACTS_DIR"):
        live_abtest.held_out([algorithm(1, "production", "9.9.9")], run.directory, path, most=10)


def test_a_server_that_is_not_there_is_told_in_a_sentence():
    with pytest.raises(live_abtest.Refused, match="No server answers at http://127"):
        live_abtest.Api(f"http://127.0.0.1:{free_port()}").algorithms("classifier")


class Gate(BaseHTTPRequestHandler):
    """Answers like a server that asks for a token, and at other addresses like a server of something else."""

    def do_GET(self):
        known = self.path.startswith("/api/v1/mlalgorithms?")
        allowed = self.headers["Authorization"] == "Token secret"
        self.send_response(404 if not known else 200 if allowed else 401)
        self.end_headers()
        self.wfile.write(b"<html>" if not known else b"[]" if allowed else b'{"message": "A token is needed."}')

    def log_message(self, *arguments):
        """Say nothing on stderr."""


@pytest.fixture(scope="module")
def gate():
    with HTTPServer(("127.0.0.1", 0), Gate) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_token_goes_with_every_call(gate):
    assert live_abtest.Api(gate, "secret").algorithms("classifier") == []


def test_what_the_server_says_when_it_refuses_is_passed_on(gate):
    with pytest.raises(live_abtest.Refused, match=r"^A token is needed\.$"):
        live_abtest.Api(gate).algorithms("classifier")


def test_a_server_of_something_else_is_told_so(gate):
    with pytest.raises(live_abtest.Refused, match="answered 404 and no JSON"):
        live_abtest.Api(f"{gate}/elsewhere", "secret").algorithms("classifier")


def test_the_interval_of_a_difference_is_newcombes():
    # The first example of his paper (1998, table II, a): 56 of 70 against 48 of 80.
    low, high = live_abtest.difference_interval(np.arange(70) < 56, np.arange(80) < 48)
    assert (low, high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


answers = st.lists(st.booleans(), min_size=1, max_size=60).map(np.array)


@given(answers, answers)
def test_a_difference_lies_in_its_interval_and_turns_round_with_the_arms(first, second):
    low, high = live_abtest.difference_interval(first, second)
    assert -1 - 1e-9 <= low <= first.mean() - second.mean() + 1e-9
    assert live_abtest.difference_interval(second, first) == pytest.approx((-high, -low))


@given(answers, answers)
def test_one_arm_is_favoured_only_when_the_interval_leaves_out_zero(first, second):
    told = live_abtest.reading({"left": first, "right": second})
    low, high = live_abtest.difference_interval(first, second)
    assert ("favour **left**" in told) == (low > 0)
    assert ("favour **right**" in told) == (high < 0)
    assert ("do not show" in told) == (low <= 0 <= high and first.mean() != second.mean())
    assert ("leaves production as it was" in told) == (first.mean() == second.mean())


def test_a_small_gap_between_arms_that_are_right_three_times_in_four_takes_about_thirty_thousand_labels():
    right = np.arange(4000) < 3000
    assert live_abtest.labels_needed(right, right, 0.01) == pytest.approx(2 * 7.85 * 0.75 * 0.25 / 0.01**2, rel=0.01)


def test_arms_without_labels_are_not_compared():
    nothing = np.array([], bool)
    assert "nothing to compare" in live_abtest.reading({"left": nothing, "right": np.array([True])})
    table = live_abtest.accuracy_table({"left": nothing, "right": np.array([True, False])})
    assert table["labelled"].tolist() == [0, 2]
    assert table["accuracy"].tolist() == ["", "50.0%"]
