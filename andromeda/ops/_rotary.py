"""The tables of `qk_norm_rotary` on a device: cos and sin by position, xPos factors by exponent, in float32.

Neither depends on the origin of a call, so one pair of tables serves all calls of a sequence, forward, backward and
token by token. Tables cover windows of 2**15 rows, or of twice the rows that a call needs. Windows overlap by half, so
that every call finds its rows in one of them.
"""

from collections.abc import Callable

import torch

from andromeda.ops import _persistent
from andromeda.reference import qk_norm_rotary as reference

_SMALLEST_WINDOW = 2**15  # rows; the exponents of a segment of 8192 positions, in both directions, fit in half of them


def angles(first: int, end: int, rotary_dim: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """A table (rows, rotary_dim) that holds, among others, cos and sin of the positions first ... end - 1, and the row
    of position `first`."""
    return _rows("angles", reference.angles, first, end, rotary_dim, device)


def factors(first: int, end: int, rotary_dim: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """A table (rows, rotary_dim / 2) that holds, among others, zeta_t ** (exponent / 512) for the exponents
    first ... end - 1, and the row of exponent `first`."""
    return _rows("factors", reference.factors, first, end, rotary_dim, device)


def window(first: int, end: int) -> tuple[int, int]:
    """The rows begin ... end - 1 of the table for a call that needs the rows first ... end - 1."""
    half = max(_SMALLEST_WINDOW // 2, 1 << max(end - first - 1, 0).bit_length())
    begin = first // half * half
    return begin, begin + 2 * half


def _rows(
    kind: str,
    make: Callable[[int, int, int], torch.Tensor],
    first: int,
    end: int,
    rotary_dim: int,
    device: torch.device,
) -> tuple[torch.Tensor, int]:
    begin, stop = window(first, end)
    table = _persistent.keep(
        kind,
        device,
        (rotary_dim, begin, stop),
        lambda: make(begin, stop, rotary_dim).to(device=device, dtype=torch.float32),
    )
    return table, first - begin
