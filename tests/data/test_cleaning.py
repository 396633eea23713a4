"""Text that is not clean: dropped, repaired or refused, and counted."""

from collections import Counter

import pytest
from source_texts import texts_of, whole_texts

from andromeda.data import cleaning
from andromeda.data.cleaning import clean
from andromeda.data.readers import Document

DIRTY = [
    ("latin.txt", "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n".encode("latin-1"), "byte 0xfc at byte 2", "gr\ufffdn"),
    ("nul.txt", "ü\0x".encode(), "a NUL character at byte 2", "ü\ufffdx"),
    ("bom-nul.txt", b"\xef\xbb\xbfa\0", "a NUL character at byte 4", "a\ufffd"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "line 2 must be UTF-8, got byte 0xff at byte 25", "\ufffd"),
    ("nul.jsonl", b'{"text": "a\\u0000"}\n', "column 'text' must be text, got a NUL character at byte 1", "a\ufffd"),
    ("lone.jsonl", b'{"text": "a\\ud800"}\n', r"the lone surrogate U\+D800 at byte 1", "a\ufffd"),
    ("a.csv", b"id,text\n1,\xe9\n", "line 2 must be UTF-8, got byte 0xe9 at byte 10", "\ufffd"),
]


@pytest.mark.parametrize(("name", "data", "message", "repaired"), DIRTY, ids=[case[0] for case in DIRTY])
def test_bad_text(tmp_path, name, data, message, repaired):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*{message}.*errors='replace'"):
        texts_of(path)
    texts, counts = texts_of(path, errors="skip")
    assert texts == (["ok"] if name == "a.jsonl" else [])
    assert (counts["skipped_documents"], counts["repaired_documents"]) == (1, 0)
    texts, counts = texts_of(path, errors="replace")
    assert texts[-1] == repaired
    assert (counts["skipped_documents"], counts["repaired_documents"]) == (0, 1)


def parts_of(*texts):
    return [Document(text, "a.txt", 10 * index, index < len(texts) - 1) for index, text in enumerate(texts)]


@pytest.mark.parametrize("waiting", [1, 1 << 20], ids=["on-disk", "in-memory"])
@pytest.mark.parametrize(
    ("texts", "errors", "expected", "counted"),
    [
        (["a", "b", "c"], "strict", ["abc"], None),
        (["a", "b", "c"], "skip", ["abc"], None),
        ([" ", "\n", "ü"], "strict", [" \nü"], None),
        ([" ", "\n", "ü"], "skip", [" \nü"], None),
        ([" ", "\n", "\t"], "strict", [], "empty_documents"),
        ([" ", "\n", "\t"], "skip", [], "empty_documents"),
        (["a", "b\0", "\udcff"], "skip", [], "skipped_documents"),
        (["\0", " ", "b"], "skip", [], "skipped_documents"),
        (["a", "b\0", "\udcff"], "replace", ["ab\ufffd\ufffd"], "repaired_documents"),
        ([" ", "\0", " "], "replace", [" \ufffd "], "repaired_documents"),
        (["a", " "], "strict", ["a "], None),
        (["\N{BYTE ORDER MARK}", "a"], "skip", ["\N{BYTE ORDER MARK}a"], None),
    ],
    ids=range(12),
)
def test_documents_in_parts(monkeypatch, texts, errors, expected, counted, waiting):
    """A document is kept, repaired or left out as a whole, wherever it is cut; the next document stays unchanged."""
    monkeypatch.setattr(cleaning, "BLOCK_BYTES", waiting)
    monkeypatch.setattr("andromeda.data.readers.BLOCK_BYTES", 4)
    counts = Counter()
    cleaned = list(clean([*parts_of(*texts), Document("next", "b.txt")], errors, counts))
    assert all(part.text for part in cleaned)
    assert list(whole_texts(cleaned)) == [*expected, "next"]
    assert +counts == ({} if counted is None else {counted: 1})


@pytest.mark.parametrize("errors", ["strict", "skip"])
def test_white_space_may_be_kept(errors):
    counts = Counter()
    documents = [Document(" \n", "a.txt"), Document("", "a.txt"), *parts_of(" ", "\t"), Document("next", "b.txt")]
    cleaned = clean(documents, errors, counts, keep_blank=True)
    assert list(whole_texts(cleaned)) == [" \n", " \t", "next"]
    assert +counts == {"empty_documents": 1}


def test_parts_go_on_without_waiting():
    """Long documents are passed on part by part, except for white space at their start."""

    def endless():
        for index in range(5):
            yield Document(" " if index < 2 else "text", "a.txt", continues=True)
        raise RuntimeError("read too far")

    cleaned = clean(endless(), "strict", Counter())
    assert [next(cleaned).text for _ in range(4)] == ["  ", "text", "text", "text"]


def test_a_fault_in_a_later_part_is_located():
    with pytest.raises(ValueError, match=r"a.txt must be text, got a NUL character at byte 12"):
        list(clean(parts_of("good", "ü\0"), "strict", Counter()))


def test_byte_order_mark_is_removed(tmp_path):
    for name, text in (("a.txt", "text"), ("b.jsonl", '{"text": "record"}\n'), ("c.json", '["item"]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    texts, counts = texts_of(tmp_path)
    assert texts == ["text", "record", "item"]
    assert counts["byte_order_marks"] == 3
