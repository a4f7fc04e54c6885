"""Who may be asked about in a test, what two models say of them, and how what the server answers is told."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pandas as pd
import pytest

import live_abtest
import train
from apps.ml.classifier.decision_tree import DecisionTreeClassifier
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
    held = live_abtest.held_out(arms, run.directory, path)
    seen = set()
    for version in ("1.0.0", "1.1.0"):
        seen |= live_abtest.open_run(run.directory, version).training_customers
    outcomes = dict(zip(second["MemberKey"], second["Stayed"], strict=True))
    assert {one.row["MemberKey"] for one in held} == set(second["MemberKey"]) - seen
    assert all(one.outcome == outcomes[one.row["MemberKey"]] for one in held)
    assert all(set(one.row) == {"MemberKey", "Visits"} for one in held)


def test_held_out_customers_come_in_an_order_that_the_seed_decides(run):
    path = run("1.0.0", members(100))
    arms = [algorithm(1, "production"), algorithm(2, "staging")]
    taken = live_abtest.held_out(arms, run.directory, path)
    assert taken == live_abtest.held_out(arms, run.directory, path)
    other = live_abtest.held_out(arms, run.directory, path, seed=1)
    assert taken != other
    assert sorted(taken, key=str) == sorted(other, key=str)


def test_a_file_of_training_customers_alone_is_refused(run, tmp_path):
    frame = members(100)
    run("1.0.0", frame)
    seen = live_abtest.open_run(run.directory, "1.0.0").training_customers
    path = tmp_path / "seen.csv"
    frame[frame["MemberKey"].isin(seen)].to_csv(path, index=False)
    with pytest.raises(live_abtest.Refused, match=r"Every customer of seen\.csv was trained on"):
        live_abtest.held_out([algorithm(1, "production")], run.directory, path)


def test_a_table_that_names_nobody_holds_nobody_out(run):
    path = run("1.0.0", members(100).drop(columns="MemberKey"))
    with pytest.raises(live_abtest.Refused, match="names no customer"):
        live_abtest.held_out([algorithm(1, "production")], run.directory, path)


def test_models_of_different_columns_cannot_be_compared_on_one_row(run):
    run("1.0.0", members(100))
    path = run("2.0.0", members(100, columns=("Visits", "Calls")))
    with pytest.raises(live_abtest.Refused, match="different columns"):
        arms = [algorithm(1, "production", "1.0.0"), algorithm(2, "staging", "2.0.0")]
        live_abtest.held_out(arms, run.directory, path)


def test_an_artifacts_folder_that_is_not_the_servers_is_told_so(run, tmp_path):
    path = run("1.0.0", members(100))
    with pytest.raises(live_abtest.Refused, match="Set ML_ARTIFACTS_DIR"):
        live_abtest.held_out([algorithm(1, "production", "9.9.9")], run.directory, path)


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


def test_a_models_right_answers_are_those_of_its_file(run):
    path = run("1.0.0", members(400))
    arm = {**algorithm(1, "production"), "key": "decision_tree"}
    customers = live_abtest.held_out([arm], run.directory, path)
    right = live_abtest.right_answers(arm, run.directory, customers)
    served = DecisionTreeClassifier("1.0.0", run.directory).compute_prediction([one.row for one in customers])
    stayed = ["1" if one.outcome == "yes" else "0" for one in customers]
    assert right.tolist() == [answer["label"] == told for answer, told in zip(served, stayed, strict=True)]


def test_an_untuned_forest_learns_only_from_customers_who_are_not_asked_about(run, tmp_path):
    frame = members(400)
    path = run("1.0.0", frame)
    arm = {**algorithm(1, "production"), "key": "decision_tree"}
    customers = live_abtest.held_out([arm], run.directory, path)
    right = live_abtest.right_answers_untuned(arm, run.directory, path, customers)
    assert 0.5 < right.mean() < 1
    assert np.array_equal(right, live_abtest.right_answers_untuned(arm, run.directory, path, customers))
    # Whoever is asked about may be left out of the file: nothing changes.
    seen = live_abtest.open_run(run.directory, "1.0.0").training_customers
    frame[frame["MemberKey"].isin(seen)].to_csv(tmp_path / "seen.csv", index=False)
    assert np.array_equal(
        right, live_abtest.right_answers_untuned(arm, run.directory, tmp_path / "seen.csv", customers)
    )


def test_a_file_without_the_training_customers_trains_no_other_model(run, tmp_path):
    run("1.0.0", members(100))
    members(100, first=1000).to_csv(tmp_path / "others.csv", index=False)
    arm = {**algorithm(1, "production"), "key": "decision_tree"}
    with pytest.raises(live_abtest.Refused, match=r"others\.csv lacks the customers of training run 1\.0\.0"):
        live_abtest.right_answers_untuned(arm, run.directory, tmp_path / "others.csv", [])


def test_a_model_that_is_not_in_the_artifacts_is_told_so(run):
    path = run("1.0.0", members(100))
    arm = {**algorithm(1, "production"), "key": "random_forest"}
    customers = live_abtest.held_out([arm], run.directory, path)
    with pytest.raises(live_abtest.Refused, match=r"has no random_forest\.joblib\. Set ML_ARTIFACTS_DIR"):
        live_abtest.right_answers(arm, run.directory, customers)


def report(verdict, champion=(0, 0), challenger=(0, 0), estimate=None, interval=None):
    """As the server tells it; an arm is (labelled, right)."""

    def arm(name, labelled, right):
        share = right / labelled if labelled else None
        around = [share - 0.1, share + 0.1] if labelled else None
        told = {"customers": 10, "labelled": labelled, "accuracy": share, "accuracy_interval": around}
        return {"name": name, **told}

    return {
        "decision": {"verdict": verdict, "sentence": f"{verdict} it."},
        "champion": arm("old 1.0.0", *champion),
        "challenger": arm("new 1.1.0", *challenger),
        "difference": {"estimate": estimate, "interval": interval},
    }


def test_a_test_stands_with_each_arm_on_a_line_and_an_arm_without_labels_has_no_accuracy():
    table = live_abtest.standing(report("HOLD", champion=(4, 2)))
    assert table.loc["champion"].tolist() == ["old 1.0.0", 10, 4, "50.0%", "40.0% to 60.0%"]
    assert table.loc["challenger"].tolist() == ["new 1.1.0", 10, 0, "", ""]


def test_only_looks_at_both_arms_have_a_difference():
    one_arm, both = report("HOLD", (4, 2)), report("CONTINUE", (4, 2), (6, 6), 0.5, [-0.2, 1.0])
    labelled, difference, interval = live_abtest.looks([one_arm, both])
    assert (labelled.tolist(), difference.tolist(), interval.tolist()) == ([10], [0.5], [[-0.2, 1.0]])
    assert [values.shape for values in live_abtest.looks([one_arm])] == [(0,), (0,), (0, 2)]


def test_the_server_is_quoted_whenever_its_verdict_changes():
    reports = [report(verdict) for verdict in ("HOLD", "HOLD", "CONTINUE", "CONTINUE", "HOLD")]
    assert live_abtest.turns(reports) == "- `HOLD`: HOLD it.\n- `CONTINUE`: CONTINUE it.\n- `HOLD`: HOLD it."


@pytest.mark.parametrize(
    ("estimate", "told"),
    [
        (0.021, "would have moved production to **new 1.1.0** for its lead of 2.1 points"),
        (-0.021, "would have kept **old 1.0.0** for its lead of 2.1 points"),
        (0.0, "Neither is ahead"),
        (None, "Neither is ahead"),
    ],
)
def test_the_accuracy_rule_follows_whoever_is_ahead(estimate, told):
    assert told in live_abtest.on_the_accuracy_rule(report("KEEP", estimate=estimate))


def test_the_intervals_of_a_replay_and_of_the_split_are_set_side_by_side():
    replayed = {"sentence": "Keep old.", "compared": 60, "difference": {"low": -0.02, "high": 0.03}}
    told = live_abtest.on_the_replay(replayed, report("KEEP", (60, 40), (50, 40), 0.1, [-0.1, 0.3]))
    assert told == "> Keep old.\n\nOn 60 customers its interval is 5.0 points wide; the split's, on 110, is 40.0."
    assert live_abtest.on_the_replay(replayed, report("HOLD")) == "> Keep old."


def test_a_difference_that_no_test_can_show_is_told_in_the_servers_words(monkeypatch):
    api = live_abtest.Api("http://127.0.0.1:1")

    def refuse(*shares):
        raise live_abtest.Refused("Less than 0.0001 takes more customers than there are.")

    monkeypatch.setattr(api, "plan", refuse)
    same = np.array([True, False])
    assert live_abtest.planned(api, same, same) == "Less than 0.0001 takes more customers than there are."
