"""What callers of transformers say about visibility, as `key_start`.

Masks, positions and documents arrive in many forms; the kernels know one: token t sees the tokens key_start[t] ... t.
The translation is arithmetic on the device of the tensors. Values are read back only to check them, and only where that
costs little: on a CPU, and in the first call on an empty cache; never while a program is traced. In a training step on
a GPU the check is an assertion on the device.

        attention_mask (batch, tokens)        padding             first visible token of the row
        attention_mask (batch, 1, n, tokens)  any of these        first visible token of each query
        position_ids (batch, n)               packed documents    last token whose position does not follow on
        seq_idx (batch, n), cu_seq_lens       packed documents    first token with this index
"""

from typing import NamedTuple, NoReturn

import torch

from andromeda.model import have_values

_OWNER = "Andromeda"


class Visibility(NamedTuple):
    """The tokens that each token sees.

    Attributes:
        key_start: (batch, n) int32, or None if each token sees all tokens before it.
        order: (batch, n) int64, or None. The tokens must be processed in this order, in which padding inside of a row
            comes first.
        padded_right: the row of some batch entry ends with padding, as far as that was checked.
    """

    key_start: torch.Tensor | None = None
    order: torch.Tensor | None = None
    padded_right: bool = False


def read_mask(mask: torch.Tensor, batch: int, n: int, past: int, *, check: bool) -> Visibility:
    """The tokens that an attention mask shows to `n` tokens after `past` tokens in a cache.

    Args:
        mask: (batch, past + n), 0 for padding, which may be anywhere in the row; or (batch or 1, 1, n, past + n or
            more), bool with True for visible or additive with 0 for visible, which must be causal with padding or
            documents: token t sees an interval of tokens that ends with t.
        check: read the values back to check them.

    Raises:
        ValueError: another shape, or a mask that `key_start` cannot express.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(
            f"{_OWNER}: attention_mask must be a tensor (batch, tokens) or (batch, 1, n, tokens), got "
            f"{type(mask).__name__}"
        )
    if mask.ndim == 4:
        return _read_causal_mask(mask, batch, n, past, check)
    if tuple(mask.shape) != (batch, past + n):
        raise ValueError(
            f"{_OWNER}: attention_mask must have shape (batch, cached tokens + seqlen) = {(batch, past + n)}, got "
            f"{tuple(mask.shape)}"
        )
    visible = mask != 0
    number = visible.to(torch.int32)
    first = torch.where(visible.any(1), number.argmax(1), past + n)
    order = None
    padded_right = False
    if check and have_values(visible):
        gaps = (number.diff(dim=1) > 0).sum(1) + number[:, 0] > 1  # the tokens of the row form more than one run
        right = ~visible[:, -1] & visible.any(1)
        has_gaps, padded_right, full = torch.stack((gaps.any(), right.any(), visible.all())).tolist()
        if full:
            return Visibility()
        if has_gaps:
            if past > 0:
                raise ValueError(
                    f"{_OWNER}: attention_mask must have its padding on the left of the first call where a cache is "
                    "used, got padding between tokens; after a learned prefix give rows of one length, or pad them on "
                    "the right where nothing is generated"
                )
            order = torch.where(visible, torch.arange(1, n + 1, device=mask.device), 0).argsort(dim=1, stable=True)
            first, padded_right = (past + n) - visible.sum(1), False
    elif not check and mask.is_cuda and have_values(visible):
        gaps = (number.diff(dim=1) > 0).sum(1) + number[:, 0] > 1
        torch._assert_async(~gaps.any(), f"{_OWNER}: attention_mask must have its padding at the ends of a row")
    return Visibility(first.to(torch.int32)[:, None].expand(batch, n), order, padded_right)


def _read_causal_mask(mask: torch.Tensor, batch: int, n: int, past: int, check: bool) -> Visibility:
    total = past + n
    if mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[2] != n or mask.shape[3] < total:
        raise ValueError(
            f"{_OWNER}: attention_mask must have shape (batch, 1, seqlen, cached tokens + seqlen) = "
            f"{(batch, 1, n, total)}, or two dimensions, got {tuple(mask.shape)}"
        )
    mask = mask[:, 0, :, :total]  # a cache of fixed size has room for more
    visible = mask == 0 if mask.is_floating_point() else mask != 0
    query = torch.arange(past, total, device=mask.device)
    first = torch.where(visible.any(2), visible.to(torch.int32).argmax(2), query)
    start = first.cummax(1).values
    if check and have_values(visible):
        key = torch.arange(total, device=mask.device)
        expected = (key >= start[..., None]) & (key <= query[:, None])
        wrong = ((visible != expected) & visible.any(2, keepdim=True)).any(2)  # padding sees nothing, or anything
        if wrong.any():
            row, token = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{_OWNER}: attention_mask must be causal, with padding or documents: each token sees an interval of "
                f"tokens that ends with itself, and no later token one that begins earlier; got another row for token "
                f"{token} of batch entry {row}. Other masks need another model"
            )
        if past == 0 and not start.any():
            return Visibility()
    return Visibility(start.to(torch.int32).expand(batch, n))


def read_positions(positions: torch.Tensor, batch: int, n: int, past: int, *, check: bool) -> torch.Tensor | None:
    """The `key_start` of packed documents: one begins where a position is not that of the token before plus one.

    Only the order matters to this model, whose positions are relative: a document may begin at any position. The first
    token of the call belongs to the document before it.

    positions: (batch or 1, n) integers, or (n,).
    """
    _check_integers("position_ids", positions)
    positions = positions[None] if positions.ndim == 1 else positions
    if tuple(positions.shape) not in ((batch, n), (1, n)):
        raise ValueError(
            f"{_OWNER}: position_ids must have shape (batch, seqlen) = {(batch, n)}, got {tuple(positions.shape)}"
        )
    return _starts(positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1, batch, n, past, check)


def read_documents(index: torch.Tensor, batch: int, n: int, past: int, *, check: bool) -> torch.Tensor | None:
    """The `key_start` of packed documents. index: (batch or 1, n), a number of each token's document."""
    _check_integers("seq_idx", index)
    if tuple(index.shape) not in ((batch, n), (1, n)):
        raise ValueError(f"{_OWNER}: seq_idx must have shape (batch, seqlen) = {(batch, n)}, got {tuple(index.shape)}")
    return _starts(index.diff(dim=1, prepend=index[:, :1]) != 0, batch, n, past, check)


def read_lengths(cumulative: torch.Tensor, batch: int, n: int, past: int = 0, *, check: bool) -> torch.Tensor | None:
    """The `key_start` of packed documents in one row.

    cumulative: (documents + 1,), their cumulative lengths, 0 ... n.
    """
    _check_integers("cu_seq_lens_q", cumulative)
    if batch != 1 or cumulative.ndim != 1:
        raise ValueError(
            f"{_OWNER}: cu_seq_lens_q must have shape (documents + 1,) with a batch of one row, got "
            f"{tuple(cumulative.shape)} with {batch} rows"
        )
    if check and have_values(cumulative) and cumulative[[0, -1]].tolist() != [0, n]:
        raise ValueError(
            f"{_OWNER}: cu_seq_lens_q must begin with 0 and end with seqlen, {n}, got {cumulative.tolist()}; other "
            "tokens, such as virtual ones before packed documents, belong to no document"
        )
    if check and have_values(cumulative) and (cumulative.diff() < 0).any():
        raise ValueError(f"{_OWNER}: cu_seq_lens_q must not decrease, got {cumulative.tolist()}")
    token = torch.arange(n, device=cumulative.device, dtype=cumulative.dtype)
    document = torch.bucketize(token, cumulative, right=True)
    return read_documents(document[None], batch, n, past, check=check)


def _check_integers(name: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{_OWNER}: {name} must be a tensor of integers, got {found}")


def check_one_document(positions: torch.Tensor, padded: Visibility) -> None:
    """ValueError if positions (batch or 1, n) do not grow from real token to real token, as those of documents do.

    padded: what a mask with padding between tokens gave.
    """
    assert padded.order is not None and padded.key_start is not None
    grows = positions.expand(padded.order.shape).gather(1, padded.order).diff(dim=1) > 0
    is_real = torch.arange(grows.shape[1], device=grows.device) >= padded.key_start[:, :1]
    if (is_real & ~grows).any():
        refuse_documents("position_ids")


def refuse_documents(name: str) -> NoReturn:
    """Packed documents are no documents in another order of the tokens."""
    raise ValueError(
        f"{_OWNER}: {name} must describe one document per row beside an attention_mask with padding between tokens, "
        "got packed documents; leave the mask out: padding at the end of a document is seen by no other document"
    )


def _starts(begins: torch.Tensor, batch: int, n: int, past: int, check: bool) -> torch.Tensor | None:
    """begins: (batch or 1, n), whether a document begins at a token; the first one never counts."""
    if check and have_values(begins) and not begins.any():
        return None
    token = torch.arange(past, past + n, device=begins.device, dtype=torch.int32)
    return torch.where(begins, token, torch.zeros_like(token)).cummax(1).values.expand(batch, n)


def both(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """The `key_start` of tokens that see only what two of them allow."""
    if first is None or second is None:
        return second if first is None else first
    return torch.maximum(first, second.to(first.device))
