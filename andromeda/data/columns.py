"""The choice of the column that holds the documents."""

from __future__ import annotations

import datetime
import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from andromeda.data.decoding import SourceError

if TYPE_CHECKING:
    import pyarrow

# The first records and files show which columns may be text.
SAMPLE_RECORDS = 100
SAMPLE_FILES = 10


class Kind(NamedTuple):
    """The kind of values in a column, as far as they are known."""

    name: str
    is_text: bool = False  # it has strings, or a schema declares them
    may_be_text: bool = True  # also if it is empty so far, or its values may contain strings (lists, objects)

    def __or__(self, other: Kind) -> Kind:
        names = self.name if other.name in self.name.split(" or ") else f"{self.name} or {other.name}"
        return Kind(names, self.is_text or other.is_text, self.may_be_text or other.may_be_text)


Columns = dict[str, Kind]

TEXT = Kind("string", is_text=True)


def value_kind(value: object) -> Kind:
    """The kind of one value of a record. A column with None may still be text, but not one with a number or time."""
    if isinstance(value, (str, bytes)):
        return TEXT
    if value is None:
        return Kind("null")
    name = "object" if isinstance(value, dict) else type(value).__name__
    return Kind(name, may_be_text=not is_number(value))


def is_number(value: object) -> bool:
    """Whether a value is a number, a boolean or a time; these are never the text of a document."""
    return isinstance(value, (bool, int, float, numbers.Number, datetime.date, datetime.time, datetime.timedelta))


def arrow_kind(type_: pyarrow.DataType) -> Kind:
    """The kind of an Arrow type; categories (dictionaries) are text if their values are."""
    from pyarrow import types

    if types.is_dictionary(type_):
        return arrow_kind(type_.value_type)._replace(name=str(type_))
    if is_string(type_):
        return TEXT
    if is_binary(type_):
        return Kind(str(type_), is_text=True)
    numbers = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_temporal)
    return Kind(str(type_), may_be_text=not any(check(type_) for check in numbers))


def is_string(type_: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)


def is_binary(type_: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_)


def schema_columns(names: Iterable[str], kinds: Iterable[Kind], where: str) -> Columns:
    """The columns of a table; two columns with the same name are an error."""
    columns: Columns = {}
    for name, kind in zip(names, kinds, strict=True):
        if name in columns:
            raise SourceError(f"{where} must name each column once, got {name!r} twice")
        columns[name] = kind
    return columns


def record_columns(records: Iterable[object]) -> Columns:
    """The columns of the dicts among the records; other values have none."""
    columns: Columns = {}
    for record in records:
        if isinstance(record, dict):
            for name, value in record.items():
                kind = value_kind(value)
                columns[name] = columns[name] | kind if name in columns else kind
    return columns


class Choice(NamedTuple):
    """The column of documents. After a guess, no other column may turn out to hold text."""

    column: str
    guessed: bool = False


def choose(tables: list[tuple[str, Columns]], wanted: str | None) -> Choice:
    """The column of documents in all tables of a source: the wanted one, else `text`, else the only possible one.

    Args:
        tables: name and columns of some tables or files.
        wanted: the column that the user asked for.

    Raises:
        SourceError: the choice is ambiguous, or one of the tables lacks the column; lists the columns.
    """
    together: Columns = {}
    for _, columns in tables:
        for name, kind in columns.items():
            together[name] = together[name] | kind if name in together else kind
    where = tables[0][0] + (f", with {len(tables) - 1} more looked at," if len(tables) > 1 else "")
    possible = [name for name, kind in together.items() if kind.may_be_text]
    if wanted is not None:
        choice = Choice(wanted)
        if wanted not in together:
            raise SourceError(f"text_column must be a column of {where}, got {wanted!r}; {listing(together)}")
    elif "text" in together:
        choice = Choice("text")
    elif len(possible) == 1 and together[possible[0]].is_text:
        choice = Choice(possible[0], guessed=True)
    else:
        found = "several columns that may be text" if len(possible) > 1 else "no column of strings"
        raise SourceError(f"{where} has {found} and none named 'text': choose with text_column; {listing(together)}")
    for name, columns in tables:
        check(choice, columns, name)
    return choice


def check(choice: Choice, columns: Columns, where: str) -> None:
    """Raise unless a table has the chosen column and, if that was guessed, no other that may be text."""
    if choice.column not in columns:
        raise SourceError(
            f"{where} must have the column {choice.column!r}, got {', '.join(columns) or 'no columns'}; choose one "
            "that all files have with text_column, or leave files out with exclude"
        )
    others = [name for name, kind in columns.items() if name != choice.column and kind.may_be_text]
    # A column that is empty in one file may hold numbers in another.
    others = [name for name in others if columns[name].name != "null"]
    if choice.guessed and others:
        raise SourceError(
            f"{where}: {choice.column!r} was the only column that may be text so far, {listing(columns)}; "
            "choose with text_column"
        )


def listing(columns: Columns) -> str:
    return "there are: " + (", ".join(f"{name} ({kind.name})" for name, kind in columns.items()) or "none")
