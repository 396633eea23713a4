"""The choice of the column of documents."""

import datetime
import decimal

import pyarrow
import pytest

from andromeda.data.columns import (
    TEXT,
    Choice,
    Kind,
    arrow_kind,
    check,
    choose,
    record_columns,
    schema_columns,
    value_kind,
)
from andromeda.data.decoding import SourceError

STRINGS = pyarrow.string()


@pytest.mark.parametrize(
    ("value", "is_text", "may_be_text"),
    [
        ("a", True, True),
        ("2020", True, True),
        (b"a", True, True),
        (None, False, True),
        (["a"], False, True),
        ({"a": "b"}, False, True),
        (1, False, False),
        (1.5, False, False),
        (True, False, False),
        (decimal.Decimal(1), False, False),
        (datetime.date(2020, 1, 1), False, False),
    ],
    ids=repr,
)
def test_values(value, is_text, may_be_text):
    kind = value_kind(value)
    assert (kind.is_text, kind.may_be_text) == (is_text, may_be_text)


@pytest.mark.parametrize(
    ("kind", "is_text", "may_be_text"),
    [
        (STRINGS, True, True),
        (pyarrow.large_string(), True, True),
        (pyarrow.string_view(), True, True),
        (pyarrow.binary(), True, True),
        (pyarrow.dictionary(pyarrow.int8(), STRINGS), True, True),
        (pyarrow.dictionary(pyarrow.int8(), pyarrow.int64()), False, False),
        (pyarrow.null(), False, True),
        (pyarrow.list_(STRINGS), False, True),
        (pyarrow.struct({"a": STRINGS}), False, True),
        (pyarrow.map_(STRINGS, STRINGS), False, True),
        (pyarrow.int64(), False, False),
        (pyarrow.float16(), False, False),
        (pyarrow.bool_(), False, False),
        (pyarrow.decimal128(5), False, False),
        (pyarrow.timestamp("s"), False, False),
        (pyarrow.date32(), False, False),
    ],
    ids=str,
)
def test_arrow_types(kind, is_text, may_be_text):
    found = arrow_kind(kind)
    assert (found.is_text, found.may_be_text) == (is_text, may_be_text)


NUMBER = Kind("int", may_be_text=False)
NULL = Kind("null")
LIST = Kind("list")


@pytest.mark.parametrize(
    ("tables", "wanted", "expected"),
    [
        ([{"text": TEXT, "other": TEXT}], None, Choice("text")),
        ([{"text": NUMBER, "other": TEXT}], None, Choice("text")),
        ([{"a": TEXT, "b": TEXT}], "b", Choice("b")),
        ([{"text": TEXT, "b": NUMBER}], "b", Choice("b")),
        ([{"a": TEXT, "n": NUMBER}], None, Choice("a", guessed=True)),
        ([{"a": TEXT}, {"a": NULL, "n": NUMBER}], None, Choice("a", guessed=True)),
        ([{"a": TEXT}, {"a": TEXT, "text": TEXT}], "a", Choice("a")),
    ],
    ids=["named", "named-number", "asked", "asked-number", "only-one", "empty-in-one", "asked-in-all"],
)
def test_choice(tables, wanted, expected):
    assert choose([(f"file {i}", columns) for i, columns in enumerate(tables)], wanted) == expected


@pytest.mark.parametrize(
    ("tables", "wanted", "message"),
    [
        ([{"a": TEXT, "b": TEXT}], None, r"several columns .*: choose with text_column; .* a \(string\), b \(string\)"),
        ([{"a": TEXT, "b": NULL}], None, r"several columns .* a \(string\), b \(null\)"),
        ([{"a": TEXT, "b": LIST}], None, r"several columns .* b \(list\)"),
        ([{"n": NUMBER}], None, r"no column of strings .* n \(int\)"),
        ([{"a": NULL}], None, r"no column of strings .* a \(null\)"),
        ([{}], None, "no column of strings .* there are: none"),
        ([{"a": TEXT}], "b", r"text_column must be a column of file 0, got 'b'; there are: a \(string\)"),
        ([{"a": TEXT}, {"b": TEXT}], None, r"file 0, with 1 more looked at, has several .* a \(string\), b \(string\)"),
        ([{"text": TEXT}, {"b": TEXT}], None, "file 1 must have the column 'text', got b; .* exclude"),
        ([{"b": TEXT}, {"text": TEXT}], None, "file 0 must have the column 'text', got b"),
        ([{"a": TEXT}, {"b": TEXT}], "a", "file 1 must have the column 'a', got b"),
        ([{"a": TEXT}, {"n": NUMBER}], None, "file 1 must have the column 'a', got n"),
    ],
    ids=["several", "null", "list", "numbers", "only-null", "none", "absent", "two-files", "text-in-first",
         "text-in-second", "asked-in-one", "guessed-in-one"],
)  # fmt: skip
def test_no_clear_choice(tables, wanted, message):
    with pytest.raises(SourceError, match=message):
        choose([(f"file {i}", columns) for i, columns in enumerate(tables)], wanted)


def test_a_guess_is_checked_in_later_files():
    check(Choice("a", guessed=True), {"a": NULL, "b": NULL, "n": NUMBER}, "late")
    check(Choice("a"), {"a": TEXT, "b": TEXT}, "late")
    with pytest.raises(SourceError, match=r"late: 'a' was the only column that may be text so far, .* b \(string\)"):
        check(Choice("a", guessed=True), {"a": TEXT, "b": TEXT}, "late")


def test_records_are_looked_at_together():
    columns = record_columns([{"a": None, "n": 1}, "a string", {"a": "x", "n": 1.5}, {"b": {}}])
    assert {name: kind.name for name, kind in columns.items()} == {
        "a": "null or string",
        "n": "int or float",
        "b": "object",
    }
    assert columns["a"].is_text and not columns["n"].may_be_text


def test_a_name_stands_for_one_column():
    assert schema_columns(["a", "b"], [TEXT, NUMBER], "file") == {"a": TEXT, "b": NUMBER}
    with pytest.raises(SourceError, match="file must name each column once, got 'a' twice"):
        schema_columns(["a", "b", "a"], [TEXT, NUMBER, TEXT], "file")
