"""The documents of a source as whole texts, for tests."""

from collections import Counter

from andromeda.data.cleaning import clean
from andromeda.data.sources import open_source


def whole_texts(documents):
    """The texts of documents; parts are joined, so memory holds each document as a whole."""
    parts = []
    for document in documents:
        parts.append(document.text)
        if not document.continues:
            yield "".join(parts)
            parts.clear()


def texts_of(source, errors="strict", text_column=None, split=None, **options):
    """The documents of a source and the counts."""
    opened = open_source(source, split, text_column=text_column, errors=errors, **options)
    return texts_of_opened(opened, errors)


def texts_of_opened(opened, errors="strict"):
    counts = Counter()
    return list(whole_texts(clean(opened.documents(counts), errors, counts))), counts
