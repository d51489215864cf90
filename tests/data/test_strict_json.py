"""JSON as its grammar says, one value at a time; the parts of long documents found as a parser finds them."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.data import strict_json
from itjax.data.strict_json import RowError, parse, parts

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab"\\,[]{}\n é\u2028'), max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
SPACE = st.text(st.sampled_from(" \n\t\r"), max_size=3)


def parts_of(raw, line=1):
    found = list(parts(lambda start, size: raw[start : start + size], start=0, stop=len(raw), line=line))
    return [np.concatenate(column).tolist() for column in zip(*found, strict=True)]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@given(values=st.lists(VALUES, max_size=6), spaces=st.lists(SPACE, min_size=14, max_size=14), ascii=st.booleans())
@settings(max_examples=60, deadline=None)
def test_parts_are_the_values_that_a_parser_finds(block, values, spaces, ascii):
    raw, lines = "[", []
    for number, value in enumerate(values):
        raw += spaces[2 * number]
        lines.append(1 + raw.count("\n"))
        raw += json.dumps(value, ensure_ascii=ascii, indent=1) + spaces[2 * number + 1]
        raw += "," if number < len(values) - 1 else ""
    raw = (raw + "]" + spaces[-1]).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "BLOCK", block)
        starts, sizes, found_lines = parts_of(raw)
    assert [json.loads(raw[start : start + size]) for start, size in zip(starts, sizes, strict=True)] == values
    assert found_lines == lines


def test_the_picture():
    raw = b'[ {"a": 1},\n  {"b": ","} ]'
    starts, sizes, lines = parts_of(raw)
    assert [raw[start : start + size] for start, size in zip(starts, sizes, strict=True)] == [
        b'{"a": 1}',
        b'{"b": ","} ',
    ]
    assert lines == [1, 2]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'[{"a": 1}\n', "line 2: not JSON: a bracket or a text is never closed"),
        (b'[{"a": "1}]\n', "line 2: not JSON: a bracket or a text is never closed"),
        (b"[1,\n,2]", "line 2: not JSON: a value is missing beside a comma"),
        (b"[1,]", "line 1: not JSON: a value is missing beside a comma"),
        (b"[1]\n\n[2]", "line 3: not JSON: more text after the end"),
        (b"[1]]", "line 1: not JSON: more text after the end"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_a_broken_document_is_refused_with_its_line(raw, message, block, monkeypatch):
    monkeypatch.setattr(strict_json, "BLOCK", block)
    with pytest.raises(RowError, match=message) as error:
        parts_of(raw)
    assert error.value.reason == "not JSON"


@given(raw=st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_bytes_break_the_parser_in_another_way(raw):
    if accepts(raw):
        assert json.loads(raw) == parse(raw)


@given(value=VALUES)
@settings(max_examples=100, deadline=None)
def test_what_json_writes_is_read(value):
    assert parse(json.dumps(value).encode()) == value == parse(json.dumps(value, ensure_ascii=False).encode())


def test_json_values_are_judged_as_the_json_test_suite_says(shared_data):
    lines = (shared_data / "json_test_suite" / "parsing_part1.jsonl").read_text().splitlines()
    cases = [case for case in map(json.loads, lines) if case["expect"] != "either"]
    assert len(cases) == 153
    wrong = {
        case["name"] for case in cases if accepts(base64.b64decode(case["base64"])) != (case["expect"] == "accept")
    }
    assert wrong == {"y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"}  # refused on purpose


def accepts(raw):
    try:
        parse(raw)
    except RowError:
        return False
    return True
