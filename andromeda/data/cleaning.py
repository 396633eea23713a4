"""Documents that are empty or not text are dropped, repaired or refused, and counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from tempfile import SpooledTemporaryFile

from andromeda.data.decoding import BLOCK_BYTES, REMEDY, Decoder
from andromeda.data.readers import Document, split_text, text_blocks

_BAD_CHARACTERS = re.compile("[\0\ud800-\udfff]")


def clean(
    documents: Iterable[Document], errors: str, statistics: Counter[str], *, keep_blank: bool = False
) -> Iterator[Document]:
    """The documents to pack, all of them strings; those that are left out or repaired are counted.

    A document in parts (`continues`) stays in parts; it is kept, repaired or left out as a whole.

    Args:
        documents: those of a source.
        errors: treatment of NUL characters and surrogates, as in `DatasetBuilder`.
        statistics: receives the counts.
        keep_blank: keep the documents that are white space; otherwise they count as empty and are left out.
    """
    documents = iter(documents)
    for document in documents:
        if document.continues:
            yield from _clean_parts(document, documents, errors, statistics, keep_blank)
            continue
        text = document.text
        if text is None or text == "":
            statistics["empty_documents"] += 1
            continue
        if not isinstance(text, str):
            got = f"{type(text).__name__} {text!r:.60}"
            raise TypeError(f"DatasetBuilder: {document.where} must be a string, got {got}")
        bad = _first_bad_character(text)
        if bad is not None:
            if errors == "strict":
                raise _bad_character(document, text, bad)
            if errors == "skip":
                statistics["skipped_documents"] += 1
                continue
            statistics["repaired_documents"] += 1
            text = _BAD_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)
            document = document._replace(text=text)
        if text.isspace() and not keep_blank:
            statistics["empty_documents"] += 1
            continue
        yield document


def _clean_parts(
    first: Document, rest: Iterator[Document], errors: str, statistics: Counter[str], keep_blank: bool
) -> Iterator[Document]:
    """`clean` for the parts of one document: `first` and the following ones, up to the last part.

    Parts are held back, in a file if there are many, as long as all of them are white space. With errors="skip" all
    parts are held back, because the last one may be bad.
    """
    with SpooledTemporaryFile(max_size=16 * BLOCK_BYTES) as waiting:
        blank, skipped, repaired = not keep_blank, False, False
        part = first
        while True:
            text = part.text
            assert isinstance(text, str)  # only texts come in parts
            bad = None if skipped else _first_bad_character(text)
            if bad is not None:
                if errors == "strict":
                    raise _bad_character(part, text, bad)
                skipped = errors == "skip"
                repaired = True
                text = _BAD_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)
            blank = blank and text.isspace()
            waits = blank or errors == "skip"
            if waits and not skipped:
                waiting.write(text.encode())
            elif not skipped:
                yield from _read_back(waiting, part, continues=True)
                yield part._replace(text=text)
            if not part.continues:
                break
            part = next(rest)
        if skipped:
            statistics["skipped_documents"] += 1
        elif blank:
            statistics["empty_documents"] += 1
        else:
            yield from _read_back(waiting, part, continues=False)
        statistics["repaired_documents"] += repaired and not skipped


def _read_back(waiting: SpooledTemporaryFile[bytes], like: Document, continues: bool) -> Iterator[Document]:
    """The parts that were written to `waiting`, which is empty afterwards."""
    if not waiting.tell():
        return
    waiting.seek(0)
    for part in split_text(text_blocks(waiting, Decoder(like.where, "strict"), None), like.where, None):
        yield part._replace(continues=part.continues or continues)
    waiting.seek(0)
    waiting.truncate()


def _bad_character(document: Document, text: str, index: int) -> ValueError:
    kind = "a NUL character" if text[index] == "\0" else f"the lone surrogate U+{ord(text[index]):04X}"
    position = document.offset + len(text[:index].encode())
    return ValueError(f"DatasetBuilder: {document.where} must be text, got {kind} at byte {position}; {REMEDY}")


def _first_bad_character(text: str) -> int | None:
    """Index of the first NUL or surrogate; `Decoder` makes surrogates of bytes that are not UTF-8."""
    if "\0" not in text:
        if text.isascii():
            return None
        try:
            text.encode()
            return None
        except UnicodeEncodeError:
            pass
    match = _BAD_CHARACTERS.search(text)
    return match.start() if match else None
