"""Evaluation of a model on whole documents: every token of each document is predicted once, and nothing else.

    documents -> token ids -> windows -> batches of windows of similar length -> likelihood of each document

The windows are those of the rolling log-likelihood of EleutherAI's lm-eval. With a window of W tokens and a stride of
S, the first window of a document holds the prefix token and the first W - 1 tokens, and predicts the first W. Each
further window predicts the next S tokens (the last window: what is left) from the W tokens before the last one that
it predicts. So every window but the first of a short document is full, and the last one overlaps the one before it.

    W = 4, S = 4      t0 t1 t2 t3 t4 t5                    W = 4, S = 1
    first     p t0 t1 t2  ->  t0 t1 t2 t3                  p t0 t1 t2   ->  t0 t1 t2 t3
    second      t1 t2 t3 t4  ->  t4 t5                       t0 t1 t2 t3  ->  t4
                                                                t1 t2 t3 t4 -> t5
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from andromeda.data.cleaning import clean
from andromeda.data.packed import PackedDataset
from andromeda.data.pieces import Seams, pieces
from andromeda.data.readers import Document
from andromeda.data.sources import Source, open_source
from andromeda.data.workers import Tokenization, Unfinished, document_batches, packing_tokenizer_json
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.model import TransformerWrapper
from andromeda.training.evaluation import Evaluation
from andromeda.training.finite import nonfinite_parameters
from andromeda.training.messages import first_few
from andromeda.training.model_checks import Model, Tokenizer, check_model, check_vocabulary, hf_tokenizer
from andromeda.training.settings import LARGEST_COUNT, Bounds

if TYPE_CHECKING:
    import datasets

    Documents: TypeAlias = (
        str | os.PathLike | Source | datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | Iterable[str]
    )

_BATCHES = 32  # so many batches of windows wait, and are sorted by length, before they run
_MOST_WAITING_TOKENS = 1 << 23
_MOST_NAMES = 20  # of empty documents


@dataclasses.dataclass
class DocumentLikelihood:
    """The likelihood of one document.

    Attributes:
        index: its number in the source, from 0 on.
        where: file or data set, with its line or row.
        nll: negative log-likelihood of its tokens, the sum in nats.
        tokens: number of its tokens, all of which are predicted; 0 for an empty document.
        bytes: of its text in UTF-8.
    """

    index: int
    where: str
    nll: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def bits_per_byte(self) -> float | None:
        """`nll` in bits per byte of text; None for an empty document."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None


@dataclasses.dataclass(frozen=True)
class ExactEvaluation(Evaluation):
    """The result of `evaluate_documents`: that of `Evaluation`, over the tokens and bytes of whole documents.

    Attributes:
        documents: number of documents with tokens.
        empty_documents: number of documents without a token, which change no figure.
        empty: where the first 20 of these are.
        skipped_documents: documents that the source left out because of bad characters (its errors="skip").
        window, stride: see `evaluate_documents`.
        windows: number of forward passes of one window.
        prefix_token_id: the token from which the first token of a document is predicted.
    """

    bits_per_byte: float
    bytes: int
    documents: int
    empty_documents: int
    empty: tuple[str, ...]
    skipped_documents: int
    window: int
    stride: int
    windows: int
    prefix_token_id: int


@torch.no_grad()
def evaluate_documents(
    model: Model,
    documents: Documents,
    *,
    tokenizer: Tokenizer,
    window: int | None = None,
    stride: int | None = None,
    prefix_token_id: int | None = None,
    batch_size: int = 8,
    max_documents: int | None = None,
    on_document: Callable[[DocumentLikelihood], object] | None = None,
    progress: bool = False,
) -> ExactEvaluation:
    """Loss, perplexity and bits per byte of `model` on whole documents, equal to lm-eval's rolling log-likelihood.

    What `evaluate` does otherwise, on packed rows: it also predicts end tokens (their nats count, and they have no
    bytes); it leaves out the tokens that do not fill the last row; it drops documents of white space; a row starts
    without context, so its first token is not predicted; and bytes are those of tokens, which must be byte-level.

    Memory holds a few batches and windows, not the documents.

    Args:
        model: `Andromeda` or `AndromedaForCausalLM`; evaluated in evaluation mode, which is restored to what it was.
        documents: what `DatasetBuilder` takes (path, name on the hub, "-", object of `datasets`), a `Source` of
            `andromeda.data.sources.open_source`, which knows columns and formats, or an iterable of strings.
        tokenizer: a fast one. Special tokens spelled in a text stay text, and none are added.
        window: tokens that the model sees at most, the prefix token among them. Default: its `max_seq_len`.
        stride: tokens that each window after the first predicts, 1 ... window. A smaller one gives each token more
            context and takes window / stride times as long. Default: window, as lm-eval.
        prefix_token_id: the token before each document. Default, as lm-eval: the BOS token, or the end token of a
            tokenizer that has none. In packed rows the end token comes before each document, and no BOS token occurs.
        batch_size: windows per forward pass.
        max_documents: evaluate only this number of first documents; None: all.
        on_document: is called with each document, in the order of the source, empty ones included.
        progress: show a bar on stderr if stderr is a terminal.

    Raises:
        TypeError: `documents` are packed rows, or an argument has the wrong type.
        ValueError: there is no token, the tokenizer has more ids than the model, or `window` exceeds the table of
            absolute positions.
        FloatingPointError: the weights or a likelihood are not finite.
    """
    owner = "evaluate_documents"
    check_model(owner, model)
    check_vocabulary(model, tokenizer)
    net = (model.to_andromeda() if isinstance(model, AndromedaForCausalLM) else model).transformer
    window, stride = _read_window(owner, net, window, stride)
    for name, value, low in (("batch_size", batch_size, 1), ("max_documents", max_documents, 1)):
        if value is not None:
            Bounds(int, low, LARGEST_COUNT).check(owner, name, value)
    prefix = _prefix(owner, net, tokenizer, prefix_token_id)
    if names := nonfinite_parameters(model):
        raise FloatingPointError(f"{owner}: model must have finite weights, got NaN or Inf in {first_few(names)}")
    source = _opened(owner, documents)
    counts: Counter[str] = Counter()
    run = _Run(net, batch_size, on_document)
    started = time.perf_counter()
    size = source.num_documents() if isinstance(source, Source) else None
    total = size if size is None or max_documents is None else min(size, max_documents)
    bar = tqdm(total=total, unit="doc", file=sys.stderr, disable=not (progress and sys.stderr.isatty()))
    was_training = model.training
    model.eval()
    try:
        with bar:
            ended = 0
            for document, ids, last in _token_ids(source, tokenizer, max_documents, counts):
                run.add(document, ids, last, window, stride, prefix)
                bar.update(run.ended - ended)
                if run.tokens:
                    bar.set_postfix_str(f"{run.tokens:,} tokens, loss {run.nll / run.tokens:.3f}", refresh=False)
                ended = run.ended
            run.flush()
            bar.update(run.ended - ended)
    finally:
        model.train(was_training)
    if not run.tokens:
        raise ValueError(
            f"{owner}: documents must hold text, got {run.ended} documents without a token"
            + (f" and {counts['skipped_documents']} skipped ones" if counts["skipped_documents"] else "")
        )
    mean = run.nll / run.tokens
    return ExactEvaluation(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),  # exp overflows a double beyond 709
        bits_per_byte=run.nll / math.log(2) / run.bytes,
        tokens=run.tokens,
        bytes=run.bytes,
        seconds=time.perf_counter() - started,
        documents=run.ended - run.empty_documents,
        empty_documents=run.empty_documents,
        empty=tuple(run.empty),
        skipped_documents=counts["skipped_documents"],
        window=window,
        stride=stride,
        windows=run.windows,
        prefix_token_id=prefix,
    )


def _read_window(owner: str, net: TransformerWrapper, window: int | None, stride: int | None) -> tuple[int, int]:
    if window is None:
        window = net.max_seq_len
    Bounds(int, 1, LARGEST_COUNT).check(owner, "window", window)
    if net.pos_emb is not None and window > net.max_seq_len:
        raise ValueError(
            f"{owner}: window must be at most max_seq_len={net.max_seq_len}, because this model has a table of "
            f"absolute positions, got {window}"
        )
    if stride is None:
        return window, window
    Bounds(int, 1, LARGEST_COUNT).check(owner, "stride", stride)
    if stride > window:
        raise ValueError(f"{owner}: stride must be at most window={window}, got {stride}; more would leave tokens out")
    return window, stride


def _prefix(owner: str, net: TransformerWrapper, tokenizer: Tokenizer, given: int | None) -> int:
    if given is not None:
        Bounds(int, 0, net.num_tokens - 1).check(owner, "prefix_token_id", given)
        return given
    inner = hf_tokenizer(tokenizer)
    for found in (inner.bos_token_id, inner.eos_token_id):
        if found is not None:
            return int(found)
    raise ValueError(
        f"{owner}: tokenizer must have a BOS or an end token, from which the first token of a document is predicted, "
        "got neither; give prefix_token_id"
    )


def _opened(owner: str, documents: object) -> Source | Iterable[str]:
    if isinstance(documents, PackedDataset):
        raise TypeError(
            f"{owner}: documents must be text, got packed rows; name the text that they were packed from, or use "
            "`evaluate`, which takes rows"
        )
    if isinstance(documents, str | os.PathLike | Source) or type(documents).__module__.startswith("datasets."):
        return open_source(documents)
    if isinstance(documents, Iterable) and not isinstance(documents, bytes | dict):
        return documents
    raise TypeError(
        f"{owner}: documents must be a path, a name on the hub, a data set of `datasets`, a Source or an iterable of "
        f"strings, got {type(documents).__name__}"
    )


def _token_ids(
    source: Source | Iterable[str], tokenizer: Tokenizer, limit: int | None, counts: Counter[str]
) -> Iterator[tuple[DocumentLikelihood, array[int], bool]]:
    """Each document, its ids or a part of them, and whether these are the last ones. Empty ones have no ids."""
    text = packing_tokenizer_json(hf_tokenizer(tokenizer).backend_tokenizer)
    # The documents that have been read and not yet tokenised to their end, and whether they have text.
    begun: deque[tuple[DocumentLikelihood, bool]] = deque()
    numbers = itertools.count()

    def documents() -> Iterator[Document]:
        """Those of the source, but for the empty ones."""
        if isinstance(source, Source):
            found = source.documents(counts)
        else:
            found = (Document(text, f"document {index}") for index, text in enumerate(source))
        read = 0
        for document in found:
            if document.text is None or document.text == "":
                begun.append((DocumentLikelihood(next(numbers), document.where), False))
            else:
                yield document
            read += not document.continues
            if read == limit:
                return

    def texts() -> Iterator[str]:
        begins = True
        errors = source.errors if isinstance(source, Source) else "strict"
        for document in clean(documents(), errors, counts, keep_blank=True):
            assert isinstance(document.text, str)
            if begins:
                begun.append((DocumentLikelihood(next(numbers), document.where), True))
            begins = not document.continues
            yield Unfinished(document.text) if document.continues else document.text

    with (
        Tokenization(text, 0, 1) as tokenization,
        contextlib.closing(tokenization.map(document_batches(pieces(texts(), Seams(text))))) as results,
    ):
        for batch, ids, lengths in results:
            end = 0
            for piece, length in zip(batch, lengths, strict=True):
                begin, end = end, end + length
                last = not isinstance(piece, Unfinished)
                while not begun[0][1]:
                    yield begun.popleft()[0], array("I"), True
                document = begun[0][0]
                document.bytes += len(piece.encode())
                # The end token that follows a document in packed rows is left out here.
                yield document, ids[begin : end - (last and length > 0)], last
                if last:
                    begun.popleft()
    while begun:
        yield begun.popleft()[0], array("I"), True


@dataclasses.dataclass(frozen=True)
class _Window:
    """ids: the input and, one position later, the targets; the last `count` ids are predicted."""

    document: DocumentLikelihood
    ids: array[int]
    count: int


class _Run:
    """Cuts documents into windows, runs these in batches, and sums the likelihoods."""

    def __init__(
        self, net: TransformerWrapper, batch_size: int, on_document: Callable[[DocumentLikelihood], object] | None
    ):
        self.nll, self.tokens, self.bytes, self.windows = 0.0, 0, 0, 0
        self.ended, self.empty_documents = 0, 0
        self.empty: list[str] = []
        self._net, self._batch_size, self._on_document = net, batch_size, on_document
        self._waiting: list[_Window] = []
        self._waiting_tokens = 0
        self._ended: list[DocumentLikelihood] = []
        # Of the document that is being read: its last ids, of which `_fresh` are not yet predicted.
        self._ids: array[int] = array("I")
        self._fresh = 0
        self._is_first = True

    def add(
        self, document: DocumentLikelihood, ids: array[int], last: bool, window: int, stride: int, prefix: int
    ) -> None:
        """Take ids of a document; `last`: there are no more."""
        if self._is_first and not self._ids:
            self._ids.append(prefix)
        self._ids.extend(ids)
        self._fresh += len(ids)
        document.tokens += len(ids)
        while self._fresh and (last or self._fresh >= (window if self._is_first else stride)):
            count = min(self._fresh, window if self._is_first else stride)
            end = len(self._ids) - self._fresh + count
            self._put(_Window(document, self._ids[max(0, end - window - 1) : end], count))
            self._fresh -= count
            del self._ids[: max(0, end - window)]
            self._is_first = False
        if last:
            del self._ids[:]
            self._is_first = True
            self._ended.append(document)
            if len(self._ended) >= _BATCHES * self._batch_size:
                self.flush()

    def _put(self, window: _Window) -> None:
        self._waiting.append(window)
        self._waiting_tokens += len(window.ids)
        if len(self._waiting) >= _BATCHES * self._batch_size or self._waiting_tokens >= _MOST_WAITING_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Run the windows that wait, and report the documents that have ended."""
        waiting = sorted(self._waiting, key=lambda window: -len(window.ids))  # the largest batch first
        self._waiting, self._waiting_tokens = [], 0
        for begin in range(0, len(waiting), self._batch_size):
            batch = waiting[begin : begin + self._batch_size]
            for window, nll in zip(batch, _negative_log_likelihoods(self._net, batch), strict=True):
                if not math.isfinite(nll):
                    raise FloatingPointError(
                        f"evaluate_documents: the likelihood must be finite, got {nll} in {window.document.where}, "
                        "though the weights are finite; try another dtype (float32) or look at this document"
                    )
                window.document.nll += nll
                self.nll += nll
                self.tokens += window.count
        self.windows += len(waiting)
        ended, self._ended = self._ended, []
        for document in ended:
            self.ended += 1
            self.bytes += document.bytes
            if not document.tokens:
                self.empty_documents += 1
                if len(self.empty) < _MOST_NAMES:
                    self.empty.append(document.where)
            if self._on_document is not None:
                self._on_document(document)


def _negative_log_likelihoods(net: TransformerWrapper, windows: list[_Window]) -> list[float]:
    """The sum of the nats of the ids that each window predicts.

    Shorter windows are padded on the right, where no token sees the padding.
    """
    ids = torch.zeros(len(windows), len(windows[0].ids), dtype=torch.int64)  # the first is the longest
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = torch.from_numpy(np.frombuffer(window.ids, dtype=np.uint32).astype(np.int64))
    ids = ids.to(net.device)
    features = net.features(ids[:, :-1])
    sums = []
    for row, window in enumerate(windows):
        end = len(window.ids)
        targets = ids[row : row + 1, end - window.count : end]
        sums.append(net.loss(features[row : row + 1, end - window.count - 1 : end - 1], targets, count=1))
    return torch.stack(sums).tolist()
