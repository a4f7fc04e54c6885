"""POST /api/v1/{endpoint}/predict: who answers, what is answered, what is logged."""

from __future__ import annotations

import json
from urllib.parse import urlencode

import pytest
from django.contrib.auth.models import User
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test.utils import CaptureQueriesContext
from knox.models import AuthToken

from apps.endpoints.models import Endpoint, MLAlgorithm, MLRequest
from apps.ml.classifier.random_forest import RandomForestClassifier
from apps.ml.registry import DEFAULT_ENDPOINT, registry
from conftest import AsServed, make_application, make_customers

PREDICT = "/api/v1/classifier/predict"
PRODUCTION = f"{PREDICT}?status=production"


@pytest.fixture(params=["nobody", "a caller who is known"])
def is_known(request):
    """Whoever has called before, of an endpoint that has answered before, is answered in another way, and alike."""
    return request.param != "nobody"


@pytest.fixture
def api(api, db, is_known):
    if is_known:
        _, token = AuthToken.objects.create(User.objects.create_superuser("ann"))
        api.credentials(HTTP_AUTHORIZATION=f"Token {token}")
        api.handler = AsServed(make_application())
    return api


@pytest.fixture
def algorithms(algorithms, api, customer, is_known):
    registry.served(DEFAULT_ENDPOINT)
    if is_known:
        assert [api.post(path, customer).status_code for path in (PREDICT, PRODUCTION)] == [200, 200]
        MLRequest.objects.all().delete()
    return algorithms


@pytest.fixture
def second_run(algorithms, artifacts_dir, customers_csv, settings) -> dict[str, MLAlgorithm]:
    """The algorithms of run 2.0.0, which entered in testing beside those of run 1.0.0."""
    import train

    settings.ML_ARTIFACTS_DIR = artifacts_dir
    train.main(["--data", str(customers_csv), "--artifacts-dir", str(artifacts_dir), "--version", "2.0.0"])
    return {algorithm.key: algorithm for algorithm in registry.register_run()}


def refused(response, status=400) -> str:
    """The message of an error, after its shape was checked."""
    assert response.status_code == status, response.content
    body = response.json()
    assert body["status"] == "Error"
    assert set(body) <= {"status", "message", "errors"}
    return body["message"]


class TestWhoAnswers:
    def test_the_algorithm_that_has_the_status_asked_for(self, api, algorithms, customer):
        for status, key in [("production", "random_forest"), ("staging", "extra_trees"), ("testing", "decision_tree")]:
            answer = api.post(f"{PREDICT}?status={status}", customer).json()

            assert (answer["algorithm"], answer["version"]) == (algorithms[key].name, "1.0.0")

    @pytest.mark.parametrize("query", ["", "?", "?status=", "?status=&version=&algorithm="])
    def test_without_a_status_the_testing_algorithm(self, api, algorithms, customer, query):
        assert api.post(PREDICT + query, customer).json()["algorithm"] == "decision tree"

    def test_the_default_status_is_a_setting(self, api, algorithms, customer, settings):
        settings.PREDICT_DEFAULT_STATUS = "staging"

        assert api.post(PREDICT, customer).json()["algorithm"] == "extra trees"

    @pytest.mark.parametrize("algorithm", ["random_forest", "random forest", "random%20forest", "random+forest"])
    def test_the_algorithm_that_is_named_by_key_or_name(self, api, algorithms, customer, algorithm):
        assert api.post(f"{PREDICT}?algorithm={algorithm}", customer).json()["algorithm"] == "random forest"

    def test_the_version_that_is_named(self, api, second_run, customer):
        answer = api.post(f"{PREDICT}?algorithm=random_forest&version=2.0.0", customer).json()

        assert (answer["algorithm"], answer["version"]) == ("random forest", "2.0.0")

    def test_of_several_that_fit_a_name_the_one_in_the_default_status(self, api, second_run, customer):
        assert api.post(f"{PREDICT}?algorithm=random_forest", customer).json()["version"] == "2.0.0"

    def test_status_version_and_algorithm_must_all_fit(self, api, second_run, customer):
        answer = api.post(f"{PREDICT}?status=production&algorithm=random_forest&version=1.0.0", customer)
        assert answer.json()["version"] == "1.0.0"

        message = refused(api.post(f"{PREDICT}?status=production&algorithm=random_forest&version=2.0.0", customer))
        assert "status=production, version=2.0.0, algorithm=random_forest" in message

    def test_several_that_fit_are_refused_with_what_could_be_named(self, api, second_run, customer):
        message = refused(api.post(f"{PREDICT}?status=testing", customer))

        assert message.startswith("4 algorithms fit status=testing; name one of: ")
        for offer in message.removesuffix(".").split("name one of: ")[1].split("; "):
            assert api.post(f"{PREDICT}?{offer}", customer).status_code == 200

    def test_none_that_fits_is_refused_with_what_could_be_named(self, api, algorithms, customer):
        message = refused(api.post(f"{PREDICT}?version=9.9.9", customer))

        assert message.startswith("No algorithm fits version=9.9.9; name one of: ")
        assert "status=production&algorithm=random_forest&version=1.0.0" in message

    def test_an_unknown_status_is_refused_with_those_there_are(self, api, algorithms, customer):
        message = refused(api.post(f"{PREDICT}?status=live", customer))

        assert message == "There is no status 'live'; use one of testing, staging, production, ab_testing."

    def test_a_retired_algorithm_is_not_served_even_when_named(self, api, algorithms, customer):
        self._set_status(api, algorithms["extra_trees"], "retired")

        for query in ("?algorithm=extra_trees", "?status=retired", "?status=staging"):
            assert "algorithm=extra_trees" not in refused(api.post(PREDICT + query, customer)).split("name one of")[1]

    def test_an_endpoint_whose_algorithms_are_all_retired_says_so(self, api, algorithms, customer):
        for algorithm in algorithms.values():
            self._set_status(api, algorithm, "retired")

        assert "Endpoint classifier serves no algorithm" in refused(api.post(PREDICT, customer))

    def test_an_unknown_endpoint_is_404_with_those_there_are(self, api, algorithms, customer):
        message = refused(api.post("/api/v1/churn/predict", customer), 404)

        assert message == "There is no endpoint 'churn'; there are: classifier."

    def test_before_any_training_503_says_which_command_trains(self, api, db, customer):
        message = refused(api.post(PRODUCTION, customer), 503)

        assert "No model has been trained yet. Train one with `python research/train.py`" in message

    def test_an_algorithm_whose_artifact_is_damaged_is_503_and_the_others_answer(
        self, api, algorithms, artifacts_dir, settings, customer
    ):
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        (artifacts_dir / "1.0.0" / "random_forest.joblib").write_bytes(b"damaged")
        registry.clear()

        assert "is not the file its manifest names" in refused(api.post(PRODUCTION, customer), 503)
        assert api.post(f"{PREDICT}?status=staging", customer).status_code == 200

    def test_each_endpoint_answers_with_its_own_algorithms(self, api, algorithms, customer):
        registry.register_run("loyalty")

        logged = MLRequest.objects.get(
            pk=api.post("/api/v1/loyalty/predict?status=production", customer).json()["request_id"]
        )

        assert logged.parent_mlalgorithm.parent_endpoint == Endpoint.objects.get(name="loyalty")

    @staticmethod
    def _set_status(api, algorithm, status):
        body = {"status": status, "created_by": "Ada", "parent_mlalgorithm": algorithm.pk}
        assert api.post("/api/v1/mlalgorithmstatuses", body).status_code == 201


class TestTheAnswer:
    def test_one_object_in_one_object_out(self, api, algorithms, customer):
        response = api.post(PRODUCTION, customer)

        assert response.status_code == 200
        answer = response.json()
        assert list(answer) == ["probability", "label", "status", "request_id", "algorithm", "version"]
        assert answer["label"] == ("1" if answer["probability"] > 0.5 else "0")
        assert answer["status"] == "OK"

    def test_is_what_the_classifier_computes(self, api, algorithms, customer, trained):
        answer = api.post(PRODUCTION, customer).json()

        computed = RandomForestClassifier(artifacts_dir=trained).compute_prediction(customer)
        assert {name: answer[name] for name in computed} == computed

    def test_a_list_in_a_list_out_in_its_order(self, api, algorithms, customer):
        customers = [{**customer, "RecencyDays": days} for days in range(0, 300, 10)]

        answers = api.post(PRODUCTION, customers).json()

        assert [answer["probability"] for answer in answers] == [
            api.post(PRODUCTION, one).json()["probability"] for one in customers
        ]
        ids = [answer["request_id"] for answer in answers]
        assert ids == sorted(set(ids))
        logged = MLRequest.objects.in_bulk(ids)
        assert [logged[pk].input_data for pk in ids] == customers

    def test_a_list_of_one_is_answered_with_a_list(self, api, algorithms, customer):
        assert len(api.post(PRODUCTION, [customer]).json()) == 1

    def test_form_and_multipart_bodies_are_answered_as_json_is(self, api, algorithms, customer):
        as_text = {"Plan": "basic", "Orders": "4", "RecencyDays": "20.0", "MeanGapDays": "31.5", "Newsletter": "true"}
        expected = api.post(PRODUCTION, customer).json()

        form = api.post(PRODUCTION, urlencode(as_text), content_type="application/x-www-form-urlencoded").json()
        multipart = api.post(PRODUCTION, as_text, format="multipart").json()

        for answer in (form, multipart):
            assert answer["probability"] == expected["probability"]
            assert MLRequest.objects.get(pk=answer["request_id"]).input_data == customer

    def test_an_empty_form_value_is_missing(self, api, algorithms):
        body = "Plan=basic&Orders=&RecencyDays=+&Newsletter=off"

        answer = api.post(PRODUCTION, body, content_type="application/x-www-form-urlencoded").json()

        assert answer["warnings"] == [
            "missing, filled with the training mode: Orders=3, RecencyDays=24, MeanGapDays=2.16"
        ]
        logged = MLRequest.objects.get(pk=answer["request_id"]).input_data
        assert logged == {"Plan": "basic", "Orders": None, "RecencyDays": None, "Newsletter": False}

    @pytest.mark.parametrize(
        ("field", "text", "expected"),
        [
            ("Orders", "four", "Orders expects a number such as 12.5, got 'four'"),
            ("Orders", "1,5", "Orders expects a number such as 12.5, got '1,5'"),
            ("Orders", "1_000", "Orders expects a number such as 12.5, got '1_000'"),
            ("Orders", "nan", "Orders is NaN"),
            ("Orders", "-inf", "Orders is infinite"),
            ("Newsletter", "perhaps", "Newsletter expects true or false, got 'perhaps'"),
            ("Ordres", "4", "'Ordres' is not a column of this model; did you mean Orders?"),
        ],
    )
    def test_a_form_value_that_is_not_of_its_columns_kind_is_refused(self, api, algorithms, field, text, expected):
        body = urlencode({"Plan": "basic", field: text})

        response = api.post(PRODUCTION, body, content_type="application/x-www-form-urlencoded")

        assert expected in refused(response)
        assert response.json()["errors"][0]["field"] == field

    def test_missing_and_null_values_are_filled_and_named_in_a_warning(self, api, algorithms):
        answer = api.post(PRODUCTION, {"Plan": "basic", "Orders": 4, "RecencyDays": 20, "MeanGapDays": None}).json()

        assert answer["warnings"] == [
            "missing, filled with the training mode: MeanGapDays=2.16, Newsletter=True",
        ]
        assert MLRequest.objects.get(pk=answer["request_id"]).full_response["warnings"] == answer["warnings"]

    def test_an_unseen_category_is_scored_with_a_warning(self, api, algorithms, customer):
        answer = api.post(PRODUCTION, {**customer, "Plan": "platinum"}).json()

        assert answer["warnings"] == ["Plan: 'platinum' was not seen in training, scored as unknown"]

    def test_the_identifier_is_kept_as_the_customers_key(self, api, algorithms, customer):
        for sent, kept in [("C00042", "C00042"), (42, "42"), (42.0, "42"), ("  7 ", "7"), (None, ""), ("Zoë", "Zoë")]:
            answer = api.post(PRODUCTION, {**customer, "CustomerId": sent}).json()

            logged = MLRequest.objects.get(pk=answer["request_id"])
            assert logged.customer_key == kept
            assert logged.input_data == customer

    def test_the_target_is_ignored_and_not_logged(self, api, algorithms, customer):
        plain = api.post(PRODUCTION, customer).json()
        with_outcome = api.post(PRODUCTION, {**customer, "IsRetained": 1}).json()

        assert with_outcome["probability"] == plain["probability"]
        assert "IsRetained" not in MLRequest.objects.get(pk=with_outcome["request_id"]).input_data

    def test_dropped_columns_are_ignored(self, api, db, tmp_path, settings, customer):
        import train

        table = tmp_path / "leaky.csv"
        make_customers().assign(Cancelled=lambda frame: 1 - frame["IsRetained"]).to_csv(table, index=False)
        options = ["--drop", "Cancelled", "--artifacts-dir", str(tmp_path / "artifacts")]
        train.main(["--data", str(table), *options])
        settings.ML_ARTIFACTS_DIR = tmp_path / "artifacts"
        registry.register_run()

        answer = api.post(PRODUCTION, {**customer, "Cancelled": "no idea"})

        assert answer.status_code == 200
        assert MLRequest.objects.get(pk=answer.json()["request_id"]).input_data == customer


class TestWhatIsLogged:
    def test_the_question_the_answer_and_who_gave_it(self, api, algorithms, customer):
        answer = api.post(PRODUCTION, {"CustomerId": "C7", **customer}).json()

        logged = MLRequest.objects.get(pk=answer["request_id"])
        assert logged.input_data == customer
        assert logged.full_response == {
            "probability": answer["probability"],
            "label": answer["label"],
            "status": "OK",
        }
        assert (logged.response, logged.probability) == (answer["label"], answer["probability"])
        assert logged.parent_mlalgorithm == algorithms["random_forest"]
        assert logged.feedback is None
        assert logged.abtest is None
        assert 0 < logged.latency_ms < 10_000

    def test_a_prediction_takes_one_query_to_choose_and_one_to_log_and_those_are_one_for_who_is_known(
        self, api, algorithms, customer, is_known, django_assert_num_queries
    ):
        api.post(PRODUCTION, customer)

        with django_assert_num_queries(1 if is_known else 2):
            api.post(PRODUCTION, customer)

    @pytest.mark.parametrize("rows", [2, 100, 101, 400])
    def test_each_customer_of_a_list_is_logged_under_the_id_that_its_answer_names(
        self, api, algorithms, customer, rows
    ):
        gone = api.post(PRODUCTION, [customer] * rows).json()
        MLRequest.objects.filter(pk=gone[-1]["request_id"]).delete()

        answers = api.post(
            PRODUCTION, [{**customer, "CustomerId": f"C{n}", "Orders": n % 9} for n in range(rows)]
        ).json()

        assert [
            (MLRequest.objects.get(pk=answer["request_id"]).customer_key, answer["probability"]) for answer in answers
        ] == [(f"C{n}", MLRequest.objects.get(customer_key=f"C{n}").probability) for n in range(rows)]

    if connection.vendor == "postgresql":

        def test_what_a_prediction_asks_is_planned_once_per_connection(self, api, algorithms, customer, is_known):
            for _ in range(10):
                api.post(PRODUCTION, customer)

            with connection.cursor() as cursor:
                cursor.execute("SELECT statement FROM pg_prepared_statements")
                prepared = [statement for (statement,) in cursor.fetchall()]
            # What serves, and the answer; of who is known also who asks, and an answer if that still holds.
            assert len(prepared) == (4 if is_known else 2)
            assert sum(statement.startswith("INSERT") for statement in prepared) == (2 if is_known else 1)

    def test_what_serves_is_asked_once_for_a_list(self, api, algorithms, customer):
        api.post(PRODUCTION, customer)

        with CaptureQueriesContext(connection) as queries:
            api.post(PRODUCTION, [customer] * 10)

        assert sum("endpoints_endpoint" in query["sql"] for query in queries) == 1

    def test_a_list_with_a_bad_row_is_refused_whole_and_nothing_is_logged(self, api, algorithms, customer):
        response = api.post(PRODUCTION, [customer, {**customer, "Orders": "four"}, 5, customer, {}])

        assert refused(response) == "row 2: Orders expects a number, got 'four' (and 2 more)"
        assert [(error["row"], error["field"]) for error in response.json()["errors"]] == [
            (2, "Orders"),
            (3, None),
            (5, None),
        ]
        assert not MLRequest.objects.exists()

    def test_of_many_bad_rows_the_first_are_told_and_the_others_counted(self, api, algorithms):
        response = api.post(PRODUCTION, [{"Orders": "four"}] * 1500)

        assert "(and 1,499 more)" in refused(response)
        assert [error["row"] for error in response.json()["errors"]] == list(range(1, 21))


NOT_A_CUSTOMER = [
    ("5", "each customer is an object of column names and values, got 5"),
    ("null", "each customer is an object of column names and values, got None"),
    ('"Orders"', "each customer is an object of column names and values, got 'Orders'"),
    ("[[]]", "each customer is an object of column names and values, got []"),
    ("{}", "no feature is given; send at least one of Plan, Orders, RecencyDays, MeanGapDays, Newsletter"),
    ('{"CustomerId": "C1"}', "no feature is given"),
    ("[]", "The list is empty; send at least one customer."),
    ("", "no feature is given"),
]
BAD_VALUES = [
    ('{"Ordres": 1}', "Ordres", "'Ordres' is not a column of this model; did you mean Orders?"),
    ('{"orders": 1}', "orders", "'orders' is not a column of this model; did you mean Orders?"),
    ('{"xyzzy": 1}', "xyzzy", "'xyzzy' is not a column of this model; columns are Plan, Orders,"),
    ('{"Orders": "1"}', "Orders", "Orders expects a number, got '1'"),
    ('{"Orders": true}', "Orders", "Orders expects a number, got True"),
    ('{"Orders": [1]}', "Orders", "Orders expects a number, got [1]"),
    ('{"Orders": {"is": 1}}', "Orders", "Orders expects a number, got {'is': 1}"),
    ('{"Plan": 1}', "Plan", "Plan expects text, got 1"),
    ('{"Newsletter": "yes"}', "Newsletter", "Newsletter expects true or false, got 'yes'"),
    ('{"Newsletter": 2}', "Newsletter", "Newsletter expects true or false, got 2"),
    ('{"Orders": NaN}', "Orders", "Orders is NaN; leave it out or send null when it is not known"),
    ('{"Orders": Infinity}', "Orders", "Orders is infinite or beyond 3.4e+38"),
    ('{"Orders": -1e999}', "Orders", "Orders is infinite or beyond 3.4e+38"),
    ('{"Orders": 1e39}', "Orders", "Orders is infinite or beyond 3.4e+38"),
    (f'{{"Orders": 1{"0" * 400}}}', "Orders", "Orders is infinite or beyond 3.4e+38"),
    (r'{"Plan": "a\u0000b"}', "Plan", "Plan holds a character that cannot be stored"),
    (r'{"Plan": "\ud800"}', "Plan", "Plan holds a character that cannot be stored"),
    (r'{"\ud800": 1}', r"\ud800", "is not a column of this model"),
    (r'{"\u0000": 1}', "\x00", "is not a column of this model"),
    (r'{"Orders": 1, "CustomerId": "\ud800"}', "CustomerId", "CustomerId holds a character that cannot be stored"),
    (f'{{"Orders": 1, "CustomerId": "{"C" * 201}"}}', "CustomerId", "CustomerId is longer than 200 characters"),
    (f'{{"Orders": 1, "CustomerId": 1{"0" * 400}}}', "CustomerId", "CustomerId is longer than 200 characters"),
    ('{"Orders": 1, "CustomerId": Infinity}', "CustomerId", "CustomerId expects text or a number, got inf"),
    ('{"Orders": 1, "CustomerId": ["C1"]}', "CustomerId", "CustomerId expects text or a number, got ['C1']"),
]
NOT_JSON = [
    "{",
    '{"Orders": 1,}',
    "{'Orders': 1}",
    f'{{"Orders": 1{"0" * 5000}}}',
    "[" * 100_000 + "]" * 100_000,
    '{"Orders":' * 100_000 + "1" + "}" * 100_000,
    b'{"Plan": "caf\xe9"}',
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
]


def post_text(api, body: str | bytes):
    return api.generic("POST", PRODUCTION, body, content_type="application/json")


class TestWhatIsRefused:
    @pytest.mark.parametrize(("body", "expected"), NOT_A_CUSTOMER)
    def test_what_is_no_customer(self, api, algorithms, body, expected):
        assert expected in refused(post_text(api, body))

    @pytest.mark.parametrize(("body", "field", "expected"), BAD_VALUES)
    def test_a_value_that_cannot_be_scored_by_its_columns_name(self, api, algorithms, body, field, expected):
        response = post_text(api, body)

        assert expected in refused(response)
        assert response.json()["errors"][0]["field"] == field
        assert not MLRequest.objects.exists()

    @pytest.mark.parametrize("body", NOT_JSON, ids=range(len(NOT_JSON)))
    def test_what_is_not_json(self, api, algorithms, body):
        assert refused(post_text(api, body)).startswith("JSON parse error")

    @pytest.mark.parametrize("depth", [10, 500, 900, 950, 980])
    def test_a_value_that_is_nested_deeply(self, api, algorithms, depth):
        refused(post_text(api, '{"Orders": ' + "[" * depth + "]" * depth + "}"))

    def test_more_columns_than_any_table_has(self, api, algorithms):
        response = post_text(api, json.dumps({f"column {number}": number for number in range(5000)}))

        assert "(and 4,999 more)" in refused(response)

    def test_a_file_in_place_of_a_value(self, api, algorithms, customer):
        response = api.post(PRODUCTION, {"Orders": SimpleUploadedFile("orders.txt", b"4")}, format="multipart")

        assert "send a file of customers to /api/v1/batch-predict" in refused(response)

    def test_json_that_is_sent_as_a_form_with_the_header_that_is_missing(self, api, algorithms, customer):
        response = api.post(PRODUCTION, json.dumps(customer), content_type="application/x-www-form-urlencoded")

        assert "send it with the header Content-Type: application/json" in refused(response, 415)

    @pytest.mark.parametrize("query", ["status=%00", "version=%00", "algorithm=%FF%00", f"algorithm={'x' * 3000}"])
    def test_a_parameter_that_can_be_no_name(self, api, algorithms, customer, query):
        response = api.post(f"{PREDICT}?{query}", customer)

        refused(response)
        assert response.json()["errors"][0]["field"] == query.split("=")[0]

    @pytest.mark.parametrize("query", ["status=%ED%A0%80", "status='", "version=%25", "algorithm=%F0%9F%8C%B3"])
    def test_a_parameter_that_names_nothing(self, api, algorithms, customer, query):
        refused(api.post(f"{PREDICT}?{query}", customer))

    def test_an_endpoint_name_that_can_be_none(self, api, algorithms, customer):
        for name in ("no.such", "%00", "-", "a%2Fb", "classifier%0A"):
            refused(api.post(f"/api/v1/{name}/predict", customer), 404)
