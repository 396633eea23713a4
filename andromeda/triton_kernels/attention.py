"""attention (docs/model.md#5): which kernel runs a call, its tiles, its workspace, its launch.

All choices follow from shapes and the device alone, never from data: a captured graph stays valid.
"""

import torch
import triton
from torch import Tensor

from andromeda.triton_kernels import launch, tiles
from andromeda.triton_kernels.attention_backward import attention_backward as backward
from andromeda.triton_kernels.attention_decode import add_splits_kernel, attention_decode_kernel
from andromeda.triton_kernels.attention_forward import attention_forward_kernel

__all__ = ["backward", "forward"]

# Up to here the softmax of a head is bounded (docs/attention.md#bounded-softmax).
MAX_BOUND = {torch.float32: 40.0, torch.bfloat16: 40.0, torch.float16: 7.0}
NOT_SPLIT = -1  # as num_splits: the kernel for many query rows
# Up to so many tokens most rows of a tile of that kernel would be empty.
MAX_DECODE_TOKENS = 32
# With more packed rows there are enough tiles of one head each; below so many keys there is little to split.
MAX_DECODE_ROWS, MIN_SPLIT_KEYS = 4096, 1024
MIN_SPLIT_TILES = 2  # tiles of keys of a split: starting and adding a split is worth about one
MAX_SPLITS = 256
ADDED_SPLITS = 32  # at a time


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    logit_bound: Tensor | None,
    key_start: Tensor | None,
    out: Tensor,
    softmax_lse: Tensor,
    causal: bool,
    softmax_scale: float,
    *,
    num_keys: Tensor | None = None,
    num_splits: int = 0,
) -> None:
    """Write out and softmax_lse, which are dense.

    num_keys: (1,) int32, the number of rows of k and v that exist, where k and v have room for more.
    num_splits: of the keys in the kernel for few queries; 0: chosen, NOT_SPLIT: the kernel for many.
    """
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, num_kv_heads = k.shape[1:3]
    architecture = launch.architecture(q.device)
    assert architecture is not None  # the caller has asked
    channels, group = tiles.padded_channels(head_dim), num_heads // num_kv_heads
    given = (q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], alibi_slopes, logit_bound, key_start, num_keys)
    widths = {"kHeadDim": head_dim, "kChannels": channels}

    few = tiles.choose(tiles.ATTENTION_DECODE, architecture, q.itemsize, channels)
    rows = min(few.rows, max(16, triton.next_power_of_2(seqlen_q * group)))
    row_blocks = triton.cdiv(seqlen_q * group, rows)
    if num_splits == 0:
        num_splits = choose_num_splits(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            group=group,
            keys=few.keys,
            decode_tiles=batch * num_kv_heads * row_blocks,
            forward_tiles=batch * num_heads * triton.cdiv(seqlen_q, 128),
            multiprocessors=launch.multiprocessors(),
        )
    elif not (num_splits == NOT_SPLIT or 1 <= num_splits <= MAX_SPLITS):
        range_of_splits = f"{NOT_SPLIT} (the kernel for many queries) to {MAX_SPLITS}"
        raise ValueError(f"attention_forward: num_splits must be {range_of_splits}, got {num_splits}")
    if num_splits == NOT_SPLIT:
        many = tiles.choose(tiles.ATTENTION_FORWARD, architecture, q.itemsize, channels)
        if not _loads_vectors(q, k, v):  # then every element of a tile has an address of its own, in registers
            many = many._replace(keys=max(16, many.keys // 2))
        query_tiles = triton.cdiv(seqlen_q, many.rows)
        attention_forward_kernel[(batch * num_heads * query_tiles,)](
            *given,
            out,
            softmax_lse,
            batch,
            seqlen_q,
            seqlen_k,
            num_heads,
            group,
            query_tiles,
            softmax_scale,
            kMaxBound=MAX_BOUND[q.dtype],
            kCausal=causal,
            kQueries=many.rows,
            kKeys=many.keys,
            **widths,
            num_warps=many.num_warps,
            num_stages=many.num_stages,
            **launch.OPTIONS,
        )
        return

    partials: tuple[Tensor | None, ...] = None, None, None
    if num_splits > 1:
        shape = (batch * num_kv_heads * row_blocks * num_splits, rows)
        partials = tuple(q.new_empty(size, dtype=torch.float32) for size in ((*shape, head_dim), shape, shape))
    attention_decode_kernel[(batch * num_kv_heads * row_blocks * num_splits,)](
        *given,
        out,
        softmax_lse,
        *partials,
        seqlen_q,
        seqlen_k,
        num_kv_heads,
        group,
        row_blocks,
        num_splits,
        softmax_scale,
        kCausal=causal,
        kRows=rows,
        kKeys=few.keys,
        **widths,
        num_warps=few.num_warps,
        num_stages=few.num_stages,
        **launch.OPTIONS,
    )
    if num_splits > 1:
        add_splits_kernel[(batch * seqlen_q * num_heads,)](
            out,
            softmax_lse,
            *partials,
            seqlen_q,
            num_kv_heads,
            group,
            row_blocks,
            num_splits,
            kRows=rows,
            kSplits=MAX_SPLITS,
            kStep=ADDED_SPLITS,
            **widths,
            num_warps=4,
            **launch.OPTIONS,
        )


def _loads_vectors(*tensors: Tensor) -> bool:
    """Whether Triton knows that all rows begin at multiples of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and not any(stride % 16 for stride in tensor.stride()[:3]) for tensor in tensors
    )


def choose_num_splits(
    *,
    seqlen_q: int,
    seqlen_k: int,
    group: int,
    keys: int,
    decode_tiles: int,
    forward_tiles: int,
    multiprocessors: int,
) -> int:
    """The number of splits of the keys in the kernel for few queries, or NOT_SPLIT for the other one.

    keys: of a tile. decode_tiles, forward_tiles: of rows, in the two kernels.
    """
    idle = 2 * forward_tiles <= multiprocessors and seqlen_k >= MIN_SPLIT_KEYS
    if seqlen_q > MAX_DECODE_TOKENS and not (idle and seqlen_q * group <= MAX_DECODE_ROWS):
        return NOT_SPLIT
    steps = triton.cdiv(seqlen_k, keys)
    most = max(1, min(2 * multiprocessors // decode_tiles, steps // MIN_SPLIT_TILES, MAX_SPLITS))
    return triton.cdiv(steps, triton.cdiv(steps, most))  # all of them as long as the longest
