"""`qk_norm_rotary` in plain torch: normalise, scale and rotate rows (docs/model.md#5.2, #5.3)."""

import torch
from torch import Tensor


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    normalize: bool = True,
    rotary_dim: int = 0,
    xpos: bool = False,
    position: int = 0,
    origin: int | None = None,
    q_multiplier: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `andromeda.ops.qk_norm_rotary`. Everything but the tables is computed in the dtype of q and k."""
    q_table, k_table = rotary_tables(q.shape[1], k.shape[1], rotary_dim, xpos, position, origin)
    return transform(q, q_scale, q_table, normalize, q_multiplier), transform(k, k_scale, k_table, normalize)


def transform(x: Tensor, scale: Tensor | None, table: Tensor, normalize: bool, multiplier: float = 1.0) -> Tensor:
    """One operand: normalised, scaled, rotated and multiplied."""
    if normalize:
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    if scale is not None:
        x = x * scale
    x = rotate(x, table)
    return x if multiplier == 1 else x * multiplier


def transform_backward(
    dout: Tensor, x: Tensor, scale: Tensor | None, table: Tensor, normalize: bool, multiplier: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `transform` for x and scale (None without a scale), as formulas (docs/model.md#16.3)."""
    dx = rotate(dout if multiplier == 1 else dout * multiplier, table, transpose=True)
    x = x.masked_fill((dx == 0).all(-1, keepdim=True), 0)  # in a row without a gradient 0 * nan would be nan
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    x_hat = x / norm.clamp_min(1e-12) if normalize else x
    dscale = None if scale is None else (dx * x_hat).sum(dim=(0, 1))
    if scale is not None:
        dx = dx * scale
    if normalize:
        # Below the floor the divisor is a constant, so no component of the gradient is projected out.
        along = torch.where(norm < 1e-12, 0.0, (x_hat * dx).sum(dim=-1, keepdim=True))
        dx = (dx - x_hat * along) / norm.clamp_min(1e-12)
    return dx, dscale


def rotate(x: Tensor, table: Tensor, transpose: bool = False) -> Tensor:
    """Rotate pairs of channels by the angles of a table; with `transpose`, by the transposed matrices."""
    pairs = (table.shape[-1] // 2, 2)
    z_cos, z_sin = table.to(x).unflatten(-1, pairs).unsqueeze(1).unbind(-1)  # (seqlen, 1, pairs)
    z_sin = -z_sin if transpose else z_sin
    even, odd = x[..., : table.shape[-1]].unflatten(-1, pairs).unbind(-1)  # (batch, seqlen, num_heads, pairs)
    rotated = torch.stack((even * z_cos - odd * z_sin, odd * z_cos + even * z_sin), dim=-1).flatten(-2)
    return torch.cat((rotated, x[..., table.shape[-1] :]), dim=-1)


def rotary_tables(
    seqlen_q: int,
    seqlen_k: int,
    rotary_dim: int,
    xpos: bool,
    position: int,
    origin: int | None,
    device: torch.device | str = "cpu",
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tables for q and k, float64 (seqlen, rotary_dim): row p holds z * cos(p * omega_t) at 2t, z * sin at 2t + 1.

    step: (1,), integers, added to all positions; see `andromeda.ops.qk_norm_rotary`.
    """
    end = position + seqlen_k
    center = default_origin(seqlen_q, seqlen_k, position) if origin is None else origin

    def table(first: int, sign: int) -> Tensor:
        positions = torch.arange(first, end, dtype=torch.float64, device=device)  # the last query sits at the last key
        if step is not None:
            positions = positions + step
        rows = _angles(positions, rotary_dim)
        if not xpos:
            return rows
        return rows * _powers(sign * (positions - center), rotary_dim).repeat_interleave(2, dim=1)

    return table(end - seqlen_q, +1), table(end - seqlen_k, -1)


def angles(first: int, end: int, rotary_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Float64 (end - first, rotary_dim): cos(p * omega_t) at 2t, sin at 2t + 1, for positions p = first ... end - 1."""
    return _angles(torch.arange(first, end, dtype=torch.float64, device=device), rotary_dim)


def _angles(positions: Tensor, rotary_dim: int) -> Tensor:
    twice_t = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device)
    omega = 10000.0 ** (-twice_t / max(rotary_dim, 1))
    p_omega = positions.unsqueeze(1) * omega
    return torch.stack((torch.cos(p_omega), torch.sin(p_omega)), dim=-1).flatten(1)


def factors(first: int, end: int, rotary_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Float64 (end - first, rotary_dim / 2): zeta_t ** (e / 512) for the exponents e = first ... end - 1."""
    return _powers(torch.arange(first, end, dtype=torch.float64, device=device), rotary_dim)


def _powers(exponents: Tensor, rotary_dim: int) -> Tensor:
    twice_t = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=exponents.device)
    log_zeta = torch.log((twice_t + 0.4 * rotary_dim) / (1.4 * rotary_dim))
    return torch.exp(log_zeta * (exponents.unsqueeze(1) / 512))


def default_origin(seqlen_q: int, seqlen_k: int, position: int) -> int:
    """The middle of the queries: there the xPos factors of both operands stay closest to 1."""
    return position + seqlen_k - (seqlen_q + 1) // 2
