"""Long documents, cut into pieces at positions (seams) where the cut changes no token.

The memory of a build therefore does not depend on the length of its documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from andromeda.data.workers import Unfinished, plain_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from andromeda.data.readers import Document

PIECE_CHARS = 1 << 17  # longer documents are tokenised in pieces of about this size
SEAM_CHARS = 256  # a pre-tokenizer may look this far on either side of a seam


def in_parts(documents: Iterable[Document]) -> Iterator[str]:
    """The texts of clean documents; a text is `Unfinished` if the next one continues it."""
    for document in documents:
        assert isinstance(document.text, str)
        yield Unfinished(document.text) if document.continues else document.text


def pieces(texts: Iterable[str], seams: Seams) -> Iterator[str]:
    """Cut texts at seams into pieces of about PIECE_CHARS; shorter texts stay whole.

    Args:
        texts: documents, or consecutive parts of them (`Unfinished`), which may end between any two characters.
        seams: those of the tokenizer.

    Yields:
        Documents and pieces of them (all but the last `Unfinished`). Each piece has tokens, and together these are the
        tokens of the document. Where no seam is found a piece grows as long as needed, up to the whole document.
    """
    parts: list[str] = []
    chars, size = 0, PIECE_CHARS
    for text in texts:
        finished = not isinstance(text, Unfinished)
        parts.append(text)
        chars += len(text)
        if finished and chars <= PIECE_CHARS:
            yield text if len(parts) == 1 else "".join(parts)
        elif finished or chars > size + SEAM_CHARS:
            rest = parts[0] if len(parts) == 1 else "".join(parts)
            parts.clear()  # so that memory does not hold them in addition to `rest`
            begin = 0
            while len(rest) - begin > size + (0 if finished else SEAM_CHARS):
                seam = seams.last(rest, begin + size // 2, begin + size)
                if seam is None:
                    size *= 2
                    continue
                yield Unfinished(rest[begin:seam])
                begin, size = seam, PIECE_CHARS
            if not finished:
                parts, chars = [rest[begin:]], len(rest) - begin
                continue
            yield rest[begin:]
        else:
            continue
        parts, chars, size = [], 0, PIECE_CHARS


class Seams:
    """Seams are positions where a text can be cut: both sides, tokenised separately, give the tokens of the whole.

    A tokenizer encodes each word of its pre-tokenizer separately, so the start of a word is a seam if the
    pre-tokenizer finds the same words without the text beyond that position. Normalizers and pre-tokenizers look only
    at a few characters around a position, so a comparison of the neighbourhood is enough: SEAM_CHARS on either side are
    encoded together and separately, and the position is a seam only if the ids are the same and a word starts there. A
    tokenizer that makes one word of everything (without a pre-tokenizer, or with one that does not split) has no seams.
    """

    # The positions to try, first those before a space between two letters: nearly all pre-tokenizers cut there.
    _CANDIDATES = (
        re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])"),
        re.compile(r"(?<=\w)(?=[^\w\s]\w)|(?<=\n)(?=\S)|(?<=\S)(?=\s\S)"),
    )
    _TRIES = 24  # for each pattern, before a longer piece is tried
    _STRETCH = 4096

    def __init__(self, tokenizer_json: str):
        self._json = tokenizer_json

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return plain_tokenizer(self._json)

    def last(self, text: str, begin: int, end: int) -> int | None:
        """The last seam found in begin < position <= end, or None."""
        for candidates in self._CANDIDATES:
            tries = 0
            for stop in range(end, begin, -self._STRETCH):
                start = max(begin, stop - self._STRETCH) + 1
                found = [match.start() for match in candidates.finditer(text, start, stop)]
                for position in reversed(found[-4:]):
                    if self._is_seam(text, position):
                        return position
                    tries += 1
                if tries >= self._TRIES:
                    break
        return None

    def _is_seam(self, text: str, position: int) -> bool:
        before, after = text[max(0, position - SEAM_CHARS) : position], text[position : position + SEAM_CHARS]
        whole = self._tokenizer.encode(before + after, add_special_tokens=False)
        left = self._tokenizer.encode(before, add_special_tokens=False).ids
        right = self._tokenizer.encode(after, add_special_tokens=False).ids
        if not left or not right or whole.ids != left + right:
            return False
        return whole.word_ids[len(left) - 1] != whole.word_ids[len(left)]
