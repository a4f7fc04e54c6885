"""POST /api/v1/batch-predict: a CSV of customers in, one answer per line out, or none if any line is bad."""

from __future__ import annotations

import csv
import io
import json
import time
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.endpoints import batch
from apps.endpoints.csv_file import BatchError
from apps.endpoints.models import MLRequest
from apps.ml.registry import registry
from conftest import make_customers

BATCH = "/api/v1/batch-predict"
FEATURES = ["Plan", "Orders", "RecencyDays", "MeanGapDays", "Newsletter"]
HEADER = ",".join(FEATURES)
THREE = f"{HEADER}\nbasic,4,20.0,31.5,True\nfamily,1,200.0,,False\npremium,9,3.0,11.25,True\n"


def upload(api, content: str | bytes, query: str = "", **fields):
    data = content.encode() if isinstance(content, str) else content
    return api.post(BATCH + query, {"file": SimpleUploadedFile("customers.csv", data), **fields}, format="multipart")


def probabilities(response) -> list[float]:
    assert response.status_code == 201, response.content
    return [row["prediction"]["probability"] for row in response.json()]


def refused(response, status=400) -> dict:
    assert response.status_code == status, response.content
    assert response.json()["status"] == "Error"
    assert not MLRequest.objects.exists()
    return response.json()


@pytest.fixture
def expected(api, algorithms) -> list[float]:
    """What the customers of THREE are answered with, one by one."""
    rows = [
        {"Plan": "basic", "Orders": 4, "RecencyDays": 20, "MeanGapDays": 31.5, "Newsletter": True},
        {"Plan": "family", "Orders": 1, "RecencyDays": 200, "Newsletter": False},
        {"Plan": "premium", "Orders": 9, "RecencyDays": 3, "MeanGapDays": 11.25, "Newsletter": True},
    ]
    found = [api.post("/api/v1/classifier/predict?status=production", row).json()["probability"] for row in rows]
    assert len(set(found)) == 3
    MLRequest.objects.all().delete()
    return found


class TestTheAnswer:
    def test_is_a_plain_array_of_id_and_prediction_in_the_files_order(self, api, algorithms, expected):
        response = upload(api, THREE)

        assert response.status_code == 201
        assert isinstance(response.json(), list)
        assert [set(row) for row in response.json()] == [{"id", "prediction"}] * 3
        assert [row["prediction"]["probability"] for row in response.json()] == expected
        first = response.json()[0]["prediction"]
        assert first == {"probability": expected[0], "label": "1" if expected[0] > 0.5 else "0", "status": "OK"}

    def test_ids_are_those_of_the_logged_requests(self, api, algorithms):
        body = THREE.replace("Plan,", "CustomerId,Plan,").replace("basic", "C1,basic").replace("family", "C2,family")
        body = body.replace("premium", "C3,premium")

        answers = upload(api, body).json()

        for answer, key in zip(answers, ["C1", "C2", "C3"], strict=True):
            logged = MLRequest.objects.get(pk=answer["id"])
            assert logged.customer_key == key
            assert logged.full_response == answer["prediction"]
            assert logged.parent_mlalgorithm == algorithms["random_forest"]
        assert MLRequest.objects.earliest("id").input_data == {
            "Plan": "basic",
            "Orders": 4,
            "RecencyDays": 20,
            "MeanGapDays": 31.5,
            "Newsletter": True,
        }

    def test_empty_cells_are_filled_and_named_in_a_warning(self, api, algorithms):
        answers = upload(api, f"{HEADER}\n,,,,\nbasic,NaN,n/a,NULL,\n").json()

        assert [answer["prediction"]["warnings"] for answer in answers] == [
            [
                "missing, filled with the training mode: "
                "Plan=premium, Orders=3, RecencyDays=24, MeanGapDays=2.16, Newsletter=True"
            ],
            ["missing, filled with the training mode: Orders=3, RecencyDays=24, MeanGapDays=2.16, Newsletter=True"],
        ]

    def test_a_category_that_was_not_seen_is_scored_with_a_warning(self, api, algorithms):
        (answer,) = upload(api, f"{HEADER}\nplatinum,4,20,31.5,True\n").json()

        assert answer["prediction"]["warnings"] == ["Plan: 'platinum' was not seen in training, scored as unknown"]

    def test_identifier_and_target_are_ignored_and_other_columns_too(self, api, algorithms, expected):
        lines = THREE.splitlines()
        more = [f"note,CustomerId,{lines[0]},IsRetained,"] + [
            f"n/a,C{i},{line},9,x" for i, line in enumerate(lines[1:])
        ]

        assert probabilities(upload(api, "\n".join(more))) == expected

    def test_columns_may_stand_in_any_order(self, api, algorithms, expected):
        table = pd.read_csv(io.StringIO(THREE))[FEATURES[::-1]]

        assert probabilities(upload(api, table.to_csv(index=False))) == expected

    def test_what_pandas_writes_with_its_index_is_understood(self, api, algorithms, expected):
        assert probabilities(upload(api, pd.read_csv(io.StringIO(THREE)).to_csv())) == expected


SPELLINGS = {
    "CRLF": THREE.replace("\n", "\r\n"),
    "CR": THREE.replace("\n", "\r"),
    "no newline at the end": THREE.rstrip("\n"),
    "BOM": "\ufeff" + THREE,
    "BOM and CRLF": "\ufeff" + THREE.replace("\n", "\r\n"),
    "quotes": "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in THREE.splitlines()),
    "semicolons": THREE.replace(",", ";"),
    "tabs": THREE.replace(",", "\t"),
    "semicolons and BOM": "\ufeff" + THREE.replace(",", ";"),
    "trailing blank line": THREE + "\n",
    "trailing blank lines with spaces": THREE + "\n   \n\t\n",
    "blank lines between": THREE.replace("\n", "\n\n"),
    "leading blank line": "\n\n" + THREE.replace(",", ";"),
    "spaces around header names": THREE.replace(HEADER, HEADER.replace(",", " , ")),
    "newline inside quotes": THREE.replace("Plan,", "Note,Plan,")
    .replace("basic", '"two\nlines, and a comma",basic')
    .replace("family", '"a ""quoted""\r\nword",family')
    .replace("premium", ",premium"),
    "another separator in quotes in the header": THREE.replace("Plan,", '"a;b;c;d;e;f;g;h",Plan,')
    .replace("basic", "x,basic")
    .replace("family", "x,family")
    .replace("premium", "x,premium"),
}


class TestHowFilesAreSpelled:
    @pytest.mark.parametrize("name", SPELLINGS)
    def test_other_spellings_of_one_table_are_answered_alike(self, api, algorithms, expected, name):
        assert probabilities(upload(api, SPELLINGS[name])) == expected

    def test_text_beyond_ascii_is_read_as_utf_8(self, api, algorithms):
        (answer,) = upload(api, f"{HEADER}\nprivé €,4,20,31.5,True\n").json()

        assert "'privé €' was not seen" in answer["prediction"]["warnings"][0]

    @pytest.mark.parametrize("name", ["customers.csv", "customers.txt", "x", "é.csv", "a" * 300])
    def test_whatever_the_files_name_is(self, api, algorithms, name):
        response = api.post(BATCH, {"file": SimpleUploadedFile(name, THREE.encode())}, format="multipart")

        assert response.status_code == 201

    @pytest.fixture
    def one_column(self, db, tmp_path, settings):
        import train

        make_customers()[["MeanGapDays", "IsRetained"]].to_csv(tmp_path / "one.csv", index=False)
        train.main(["--data", str(tmp_path / "one.csv"), "--artifacts-dir", str(tmp_path / "artifacts")])
        settings.ML_ARTIFACTS_DIR = tmp_path / "artifacts"
        return registry.register_run()

    def test_in_a_file_of_one_column_a_blank_line_is_no_customer_and_empty_quotes_are_one(self, api, one_column):
        text = 'MeanGapDays\n\n1.5\n""\n\n30\n\n'

        answers = upload(api, text).json()

        assert ["warnings" in answer["prediction"] for answer in answers] == [False, True, False]
        assert len(answers) == len(pd.read_csv(io.StringIO(text)))


BAD_FILES = {
    "empty": ("", "The file is empty; the first line must name the columns."),
    "only a BOM": ("\ufeff", "The file is empty; the first line must name the columns."),
    "only blank lines": ("\n\r\n  \n", "The file is empty; the first line must name the columns."),
    "header only": (HEADER + "\n", "The file has a header only; add a line for each customer."),
    "header only, no newline": (HEADER, "The file has a header only; add a line for each customer."),
    "a missing column": (
        "Plan,Orders,RecencyDays,Newsletter\nbasic,4,20,True\n",
        "The file lacks the columns MeanGapDays; add them, and leave cells empty where not known.",
    ),
    "a misspelled column": (
        THREE.replace("MeanGapDays", "mean_gap_days").replace("Orders", "orders"),
        "The file lacks the columns Orders (is it orders?), MeanGapDays (is it mean_gap_days?); add them,",
    ),
    "no header": (THREE.split("\n", 1)[1], "The file lacks the columns Plan, Orders, RecencyDays, MeanGapDays,"),
    "a column twice": (
        "\n".join(line + "," + line.split(",")[1] for line in THREE.splitlines()),
        "The header names Orders more than once.",
    ),
    "a picture": (
        b"\x89PNG\r\n\x1a\n\x00\x00",
        "line 1: holds a byte that is not UTF-8 (0x89); save the file as UTF-8",
    ),
    "one endless line": ("x" * 1_000_000, "line 1: is no valid CSV: field larger than field limit"),
    "UTF-16": (THREE.encode("utf-16"), "line 1: holds a byte that is not UTF-8 (0xff); save the file as UTF-8"),
}
BAD_LINES = {
    "too few fields": (THREE.replace("family,1,200.0,,", "family,1,200.0,"), 3, "has 4 fields where the header has 5"),
    "too many fields": (THREE.replace("11.25", "11,25"), 4, "has 6 fields where the header has 5"),
    "one field": (THREE + "total: 3\n", 5, "has 1 fields where the header has 5"),
    "Latin-1": (THREE.replace("family", "privé").encode("latin-1"), 3, "holds a byte that is not UTF-8 (0xe9)"),
    "Latin-1, CR": (
        THREE.replace("\n", "\r").replace("family", "privé").encode("latin-1"),
        3,
        "holds a byte that is not UTF-8 (0xe9)",
    ),
    "NUL": (THREE.replace("family", "fam\x00ily"), 3, "holds a NUL character"),
    "an unclosed quote": (THREE.replace("family", '"family'), 3, "is no valid CSV"),
    "a stray quote": (THREE.replace("family", '"fam"ily'), 3, "is no valid CSV"),
    "a cell beyond all bounds": (THREE.replace("family", "x" * 200_000), 3, "is no valid CSV: field larger than"),
}
BAD_CELLS = [
    ("200.0", "soon", "RecencyDays", "RecencyDays expects a number such as 12.5, got 'soon'"),
    ("200.0", '"12,5"', "RecencyDays", "RecencyDays expects a number such as 12.5, got '12,5'"),
    ("200.0", "inf", "RecencyDays", "RecencyDays is infinite"),
    ("200.0", "1e39", "RecencyDays", "RecencyDays is infinite"),
    ("False", "maybe", "Newsletter", "Newsletter expects true or false, got 'maybe'"),
]


class TestWhatIsRefused:
    @pytest.mark.parametrize("name", BAD_FILES)
    def test_a_file_that_is_no_table_of_customers(self, api, algorithms, name):
        content, expected = BAD_FILES[name]

        assert expected in refused(upload(api, content))["message"]

    @pytest.mark.parametrize("name", BAD_LINES)
    def test_a_broken_line_with_its_number(self, api, algorithms, name):
        content, line, expected = BAD_LINES[name]

        body = refused(upload(api, content))

        assert body["message"].startswith(f"line {line}: {expected}")
        assert body["errors"][0]["line"] == line

    @pytest.mark.parametrize(("good", "bad", "field", "expected"), BAD_CELLS)
    def test_a_bad_cell_with_its_line_and_column(self, api, algorithms, good, bad, field, expected):
        body = refused(upload(api, THREE.replace(good, bad)))

        assert body["message"].startswith(f"line 3: {expected}")
        assert (body["errors"][0]["line"], body["errors"][0]["field"]) == (3, field)

    def test_lines_are_counted_as_an_editor_counts_them(self, api, algorithms):
        text = (
            THREE.replace("Plan,", "Note,Plan,")
            .replace("basic", '"one\ntwo\nthree",basic')
            .replace("family", ",family")
        )
        text = text.replace("premium", "\n\n,premium").replace("11.25", "soon")
        line = 1 + text[: text.index("soon")].count("\n")

        assert refused(upload(api, text))["errors"][0]["line"] == line == 8

    def test_of_many_bad_lines_the_first_are_told_and_the_others_counted(self, api, algorithms):
        body = refused(upload(api, HEADER + "\n" + "basic,x,1,1,True\n" * 500))

        assert "line 2: " in body["message"]
        assert "(and 499 more)" in body["message"]
        assert [error["line"] for error in body["errors"]] == list(range(2, 22))

    def test_an_identifier_that_cannot_be_kept_with_its_line(self, api, algorithms):
        text = f"CustomerId,{HEADER}\nC1,basic,4,20,31.5,True\n{'C' * 201},basic,4,20,31.5,True\n"

        assert "line 3: CustomerId is longer than 200 characters" in refused(upload(api, text))["message"]

    def test_a_request_without_a_file(self, api, algorithms):
        assert refused(api.post(BATCH, {"status": "production"}, format="multipart"))["errors"][0]["field"] == "file"
        assert "not a file" in refused(api.post(BATCH, {"file": THREE}, format="multipart"))["message"]
        assert refused(api.generic("POST", BATCH))["errors"][0]["field"] == "file"
        assert refused(api.post(BATCH, {}, format="multipart"))["errors"][0]["field"] == "file"

    def test_a_body_that_is_no_multipart_form(self, api, algorithms):
        refused(api.post(BATCH, {"file": THREE}, format="json"), 415)
        refused(api.generic("POST", BATCH, THREE, content_type="text/csv"), 415)
        refused(api.generic("POST", BATCH, THREE, content_type="multipart/form-data"))
        refused(api.generic("POST", BATCH, THREE, content_type="multipart/form-data; boundary=x"))

    def test_a_file_over_the_limit(self, api, algorithms, settings):
        settings.BATCH_MAX_BYTES = 1000

        assert "the limit is 1,000" in refused(upload(api, THREE * 10), 413)["message"]

    def test_the_files_limit_is_not_that_of_other_bodies(self, api, algorithms, settings):
        settings.MAX_BODY_BYTES = 100

        assert upload(api, THREE).status_code == 201

    def test_an_unknown_format(self, api, algorithms):
        assert refused(upload(api, THREE, format="xlsx"))["errors"][0]["field"] == "format"


class TestWhoAnswers:
    def test_production_unless_another_status_is_named(self, api, algorithms):
        for fields, key in [
            ({}, "random_forest"),
            ({"status": "staging"}, "extra_trees"),
            ({"status": ""}, "random_forest"),
            ({"status": "testing", "version": "1.0.0"}, "decision_tree"),
            ({"version": "", "algorithm": "", "endpoint": ""}, "random_forest"),
            ({"version": "1.0.0"}, "random_forest"),
            ({"algorithm": "extra_trees"}, "extra_trees"),
            ({"version": "1.0.0", "algorithm": "decision_tree"}, "decision_tree"),
        ]:
            answers = upload(api, THREE, **fields).json()

            assert MLRequest.objects.get(pk=answers[0]["id"]).parent_mlalgorithm == algorithms[key]

    def test_parameters_may_stand_in_the_address_too_and_the_form_overrules_them(self, api, algorithms):
        answers = upload(api, THREE, "?status=staging").json()
        assert MLRequest.objects.get(pk=answers[0]["id"]).parent_mlalgorithm == algorithms["extra_trees"]

        answers = upload(api, THREE, "?status=staging", status="testing").json()
        assert MLRequest.objects.get(pk=answers[0]["id"]).parent_mlalgorithm == algorithms["decision_tree"]

    def test_no_match_is_refused_with_what_could_be_named(self, api, algorithms):
        assert "name one of: status=production" in refused(upload(api, THREE, version="9.9.9"))["message"]
        assert "There is no status 'live'" in refused(upload(api, THREE, status="live"))["message"]

    def test_an_unknown_endpoint_is_404(self, api, algorithms):
        assert "There is no endpoint 'churn'" in refused(upload(api, THREE, endpoint="churn"), 404)["message"]

    def test_another_endpoint_is_named_in_the_form(self, api, algorithms):
        registry.register_run("loyalty")

        answers = upload(api, THREE, endpoint="loyalty").json()

        logged = MLRequest.objects.get(pk=answers[0]["id"])
        assert logged.parent_mlalgorithm.parent_endpoint.name == "loyalty"

    def test_before_any_training_503_says_which_command_trains(self, api, db):
        assert "python research/train.py" in refused(upload(api, THREE), 503)["message"]

    def test_a_batch_stays_outside_a_running_test_and_the_champion_answers(self, api, algorithms):
        body = {
            "title": "Is the tree enough?",
            "parent_mlalgorithm_1": algorithms["decision_tree"].pk,
            "parent_mlalgorithm_2": algorithms["random_forest"].pk,
        }
        assert api.post("/api/v1/abtests", body).status_code == 201

        answers = upload(api, HEADER + "\n" + "basic,4,20,31.5,True\n" * 50).json()

        logged = MLRequest.objects.filter(pk__in=[answer["id"] for answer in answers])
        assert set(logged.values_list("parent_mlalgorithm", "abtest")) == {(algorithms["random_forest"].pk, None)}


class TestCsv:
    def test_is_the_upload_with_probability_and_label_added(self, api, algorithms, expected):
        text = 'Note,"Customer, name",' + THREE.replace("\nb", '\nx,"Doe, ""Jo""",b').replace("\nf", "\n,=1+1,f")
        text = text.replace("\np", '\n"two\nlines","Zo\rë",p')

        response = upload(api, text, format="csv")

        assert response.status_code == 201
        assert response["Content-Type"] == "text/csv; charset=utf-8"
        assert response["Content-Disposition"] == 'attachment; filename="predictions.csv"'
        sent = list(csv.reader(io.StringIO(text, newline="")))
        received = list(csv.reader(io.StringIO(response.content.decode(), newline="")))
        assert [row[:-2] for row in received] == sent
        assert received[0][-2:] == ["probability", "label"]
        assert [float(row[-2]) for row in received[1:]] == expected
        assert [row[-1] for row in received[1:]] == ["1" if probability > 0.5 else "0" for probability in expected]

    def test_its_numbers_are_spelled_as_those_of_the_json_answer(self, api, algorithms):
        spelled = json.loads(upload(api, THREE).content, parse_float=str)

        answered = upload(api, THREE, format="csv").content.decode()

        assert [line.split(",")[-2] for line in answered.splitlines()[1:]] == [
            row["prediction"]["probability"] for row in spelled
        ]

    def test_may_be_uploaded_again(self, api, algorithms):
        once = upload(api, THREE, format="csv").content
        twice = upload(api, once, format="csv").content

        assert twice == once

    def test_keeps_the_separator_and_the_byte_order_mark_that_a_spreadsheet_wrote(self, api, algorithms):
        answered = upload(api, "\ufeff" + THREE.replace(",", ";"), format="csv").content.decode()

        assert answered.splitlines()[0] == "\ufeff" + HEADER.replace(",", ";") + ";probability;label"

    def test_is_given_to_a_client_that_accepts_nothing_but_csv(self, api, algorithms):
        file = SimpleUploadedFile("customers.csv", THREE.encode())

        response = api.post(BATCH, {"file": file, "format": "csv"}, format="multipart", HTTP_ACCEPT="text/csv")

        assert response.status_code == 201

    def test_errors_are_json_all_the_same(self, api, algorithms):
        assert "lacks the columns" in refused(upload(api, "a,b\n1,2\n", format="csv"))["message"]


class TestSize:
    def test_ten_thousand_rows_in_one_upload_are_answered_in_order(self, api, algorithms):
        table = make_customers(10_000, seed=3)
        began = time.process_time()  # a busy machine is no slow server

        response = upload(api, table.to_csv(index=False))

        assert time.process_time() - began < 5
        answers = response.json()
        assert [below["id"] < above["id"] for below, above in pairwise(answers)] == [True] * 9_999
        keys = dict(MLRequest.objects.values_list("id", "customer_key"))
        assert [keys[answer["id"]] for answer in answers] == table["CustomerId"].tolist()
        classifier = registry.get(algorithms["random_forest"])
        computed = classifier.compute_prediction(table[FEATURES])
        assert [answer["prediction"] for answer in answers] == computed

    def test_a_row_is_answered_alike_alone_and_among_many(self, api, algorithms):
        table = make_customers(200, seed=5)
        together = probabilities(upload(api, table.to_csv(index=False)))

        for position in np.random.default_rng(0).choice(200, 10, replace=False):
            alone = probabilities(upload(api, table.iloc[[position]].to_csv(index=False)))
            assert alone == [together[position]]


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)


class TestReading:
    """`read_csv` against Python's own writer: whatever is written is read, at the line where it stands."""

    @settings(max_examples=100, deadline=None)
    @given(
        rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6),
        delimiter=st.sampled_from(",;\t"),
        newline_and_quoting=st.sampled_from(
            [("\r\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL), ("\n", csv.QUOTE_ALL), ("\r", csv.QUOTE_ALL)]
        ),
        bom=st.booleans(),
    )
    def test_what_is_written_is_read(self, rows, delimiter, newline_and_quoting, bom):
        newline, quoting = newline_and_quoting
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, delimiter=delimiter, lineterminator=newline, quoting=quoting)
        writer.writerow(["a", "b", "c"])
        starts = []
        for row in rows:
            starts.append(len(buffer.getvalue().encode().splitlines()) + 1)
            writer.writerow(row)
        data = buffer.getvalue().encode("utf-8-sig" if bom else "utf-8")

        table = batch.read_csv(io.BytesIO(data))

        assert table.layout.header == ["a", "b", "c"]
        assert table.rows == [list(row) for row in rows]
        assert table.lines == starts
        assert table.layout.delimiter == delimiter

    @settings(max_examples=100, deadline=None)
    @given(data=st.binary(max_size=80) | st.text("abc,;\t\"'\r\n \x00", max_size=60).map(str.encode))
    def test_any_bytes_are_read_or_refused(self, data):
        try:
            table = batch.read_csv(io.BytesIO(data))
        except BatchError:
            return
        assert len(table.rows) == len(table.lines) > 0
        assert {len(row) for row in table.rows} == {len(table.layout.header)}
