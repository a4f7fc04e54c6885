"""What is read from a JSON text, and written to one, is what the standard library reads and writes."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.endpoints import json_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def same(one: object, other: object) -> bool:
    """Equal, in type and to the sign of a zero."""
    return repr(one) == repr(other)


@given(VALUES)
def test_what_is_written_is_read_back_by_both(value):
    text = json_text.dumps(value)

    assert same(json.loads(text), value)
    assert same(json_text.loads(text.encode()), value)


@given(VALUES, st.booleans())
def test_a_text_is_read_as_the_standard_library_reads_it(value, is_ascii):
    text = json.dumps(value, ensure_ascii=is_ascii, indent=1).encode("utf-8", "surrogatepass")

    assert same(json_text.loads(text), json.loads(text.decode("utf-8", "surrogatepass")))


@given(st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True))
def test_a_number_is_read_to_the_last_digit(number):
    read = json_text.loads(number.encode())

    assert same(read, json.loads(number)) or (math.isinf(read) and math.isinf(json.loads(number)))


@pytest.mark.parametrize(
    "text", ['["\\ud800"]', "NaN", "[Infinity, -Infinity]", "[1e999]", '{"a": 1, "a": 2}', "12345678901234567890123"]
)
def test_what_json_permits_is_read(text):
    assert same(json_text.loads(text.encode()), json.loads(text))


@pytest.mark.parametrize(
    "text", [b"", b"[1,", b"{1: 2}", b'"\xff"', b"\xef\xbb\xbf[1]", b"[01]", b"nul", b"[1] [2]", b"'a'"]
)
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):
        json_text.loads(text)


def test_a_text_that_is_nested_without_end_is_refused():
    with pytest.raises(RecursionError):
        json_text.loads(b"[" * 1_000_000)


def test_another_encoding_is_read():
    assert json_text.loads('["Zoë"]'.encode("latin-1"), "latin-1") == ["Zoë"]


def test_what_no_json_can_hold_is_written_as_null():
    assert json_text.dumps([math.nan, math.inf]) == "[null,null]"


def test_half_a_surrogate_pair_is_written_as_an_escape():
    assert json_text.dumps(["\ud800"]) == '["\\ud800"]'
