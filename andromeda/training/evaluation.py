"""How well a model predicts some text: loss, perplexity, bits per byte."""

import dataclasses
import json
import math
import sys
import time

import torch
from tqdm import tqdm

from andromeda.huggingface import AndromedaForCausalLM
from andromeda.model import Andromeda
from andromeda.training.finite import nonfinite_parameters
from andromeda.training.messages import first_few
from andromeda.training.model_checks import check_model, check_vocabulary, hf_tokenizer
from andromeda.training.rows import collate
from andromeda.training.settings import LARGEST_COUNT, Bounds


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts some text.

    Attributes:
        loss: mean negative log-likelihood in nats per token.
        perplexity: its exponential.
        bits_per_byte: the same likelihood in bits per byte of text, which compares across tokenizers; None where the
            bytes of a token are not known.
        tokens: predicted tokens.
        bytes: bytes of text they stand for, or None.
        seconds: time it took.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int | None
    seconds: float


@torch.no_grad()
def evaluate(model, dataset, *, tokenizer=None, batch_size=8, max_rows=None, progress=False) -> Evaluation:
    """Loss, perplexity and bits per byte of `model` on the rows of `dataset`, each token weighted alike.

    Args:
        model: `Andromeda` or `AndromedaForCausalLM`.
        dataset: rows as in `train`.
        tokenizer: gives the bytes of each token; only byte-level tokenizers have them.
        max_rows: look at the first so many rows only.
        progress: a bar on stderr, on a terminal.

    Raises:
        ValueError: no token is predicted, or the tokenizer has more ids than the model.
        FloatingPointError: the weights or a loss are not finite.
    """
    check_model("evaluate", model)
    check_vocabulary(model, tokenizer)
    for name, value, low in (("batch_size", batch_size, 1), ("max_rows", max_rows, 0)):
        if value is not None:
            Bounds(int, low, LARGEST_COUNT).check("evaluate", name, value)
    if isinstance(model, Andromeda):
        model = AndromedaForCausalLM.from_andromeda(model)
    if names := nonfinite_parameters(model):
        raise FloatingPointError(f"evaluate: model must have finite weights, got NaN or Inf in {first_few(names)}")
    device = model.device
    widths = None if tokenizer is None else token_bytes(tokenizer)
    rows = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    total, tokens, size = 0.0, 0, 0
    started = time.perf_counter()
    bar = tqdm(
        range(0, rows, batch_size), unit="batch", file=sys.stderr, disable=not (progress and sys.stderr.isatty())
    )
    for begin in bar:
        batch = collate([dataset[index] for index in range(begin, min(begin + batch_size, rows))])
        targets = batch["labels"][:, 1:]
        targets = targets[targets != -100]
        if not len(targets):
            continue
        loss = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"evaluate: the loss must be finite, got {loss.item()} in the rows from {begin} on, though the weights "
                "are finite; try another dtype (float32) or look at these rows"
            )
        total += loss.item() * len(targets)
        tokens += len(targets)
        size += 0 if widths is None else int(widths[targets].sum())
    if not tokens:
        raise ValueError(f"evaluate: dataset must have a token to predict, got {rows} rows without one")
    loss = total / tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows a double beyond 709
        bits_per_byte=total / math.log(2) / size if size else None,
        tokens=tokens,
        bytes=size or None,
        seconds=time.perf_counter() - started,
    )


def token_bytes(tokenizer) -> torch.Tensor | None:
    """Bytes of text of each token id, int64 (len(tokenizer),), special tokens 0; None unless it is byte-level.

    A byte-level vocabulary writes one character per byte, so the length of an entry is the number of its bytes; tokens
    added later are written as themselves.
    """
    tokenizer = hf_tokenizer(tokenizer)
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    if "ByteLevel" not in {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", ()))}:
        return None
    widths = torch.zeros(len(tokenizer), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        widths[index] = len(token)
    for index, token in tokenizer.added_tokens_decoder.items():
        widths[index] = 0 if token.special else len(token.content.encode())
    return widths
