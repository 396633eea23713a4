"""Evaluation of a model on text: loss, perplexity, bits per byte."""

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
from andromeda.training.model_checks import Model, Tokenizer, check_model, check_vocabulary, hf_tokenizer
from andromeda.training.rows import IGNORED_LABEL, Rows, collate
from andromeda.training.settings import LARGEST_COUNT, Bounds


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of evaluating a model on text.

    Attributes:
        loss: mean negative log-likelihood in nats per token.
        perplexity: its exponential.
        bits_per_byte: the same likelihood in bits per byte of text, which is comparable across tokenizers; None where
            the bytes of a token are not known.
        tokens: number of predicted tokens.
        bytes: bytes of text in these tokens, or None.
        seconds: duration of the evaluation.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int | None
    seconds: float


@torch.no_grad()
def evaluate(
    model: Model,
    dataset: Rows,
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 8,
    max_rows: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Loss, perplexity and bits per byte of `model` on the rows of `dataset`; every token has the same weight.

    Args:
        model: `Andromeda` or `AndromedaForCausalLM`.
        dataset: rows as in `train`.
        tokenizer: gives the bytes of each token; only byte-level tokenizers have them.
        batch_size: rows per forward pass.
        max_rows: evaluate only this number of first rows; None: all.
        progress: show a bar on stderr if stderr is a terminal.

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
    bytes_of = None if tokenizer is None else token_bytes(tokenizer)
    rows = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    total, tokens, text_bytes = 0.0, 0, 0
    started = time.perf_counter()
    bar = tqdm(
        range(0, rows, batch_size), unit="batch", file=sys.stderr, disable=not (progress and sys.stderr.isatty())
    )
    for begin in bar:
        batch = collate([dataset[index] for index in range(begin, min(begin + batch_size, rows))])
        targets = batch["labels"][:, 1:]
        targets = targets[targets != IGNORED_LABEL]
        if not len(targets):
            continue
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        loss = model(**inputs, use_cache=False, skip_logits=True).loss.item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"evaluate: the loss must be finite, got {loss} in the rows from {begin} on, though the weights are "
                "finite; try another dtype (float32) or look at these rows"
            )
        total += loss * len(targets)
        tokens += len(targets)
        text_bytes += 0 if bytes_of is None else int(bytes_of[targets].sum())
    if not tokens:
        raise ValueError(f"evaluate: dataset must have a token to predict, got {rows} rows without one")
    mean = total / tokens
    return Evaluation(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),  # exp overflows a double beyond 709
        bits_per_byte=total / math.log(2) / text_bytes if text_bytes else None,
        tokens=tokens,
        bytes=text_bytes or None,
        seconds=time.perf_counter() - started,
    )


def token_bytes(tokenizer: Tokenizer) -> torch.Tensor | None:
    """Bytes of text of each token id, int64 (len(tokenizer),), 0 for special tokens; None if it is not byte-level.

    A byte-level vocabulary writes one character per byte, so the length of an entry is the number of its bytes; tokens
    added later are written as themselves.
    """
    tokenizer = hf_tokenizer(tokenizer)
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    if "ByteLevel" not in {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", ()))}:
        return None
    lengths = torch.zeros(len(tokenizer), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        lengths[index] = 0 if added.special else len(added.content.encode())
    return lengths
