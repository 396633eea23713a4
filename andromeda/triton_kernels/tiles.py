"""The table of tiles: sizes, warps and stages of every kernel by architecture, width of a head and size of an element.

Fixed, without an autotuner: a call takes the same kernel every time, and nothing is measured while a program runs.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """How a kernel of attention divides its work."""

    rows: int  # of queries
    keys: int
    num_warps: int
    num_stages: int  # tiles of keys and of values in shared memory


# (architecture, bytes of an element) -> widest padded head_dim -> tile of `attention_forward_kernel`.
#
# float32 has no tensor cores here (`input_precision="ieee"`): its tiles are small. On an H200 three entries spill
# registers (tests/triton_budget.toml) and are faster all the same than those that do not, at 8192 tokens and 24 heads:
# 64 channels 0.53 ms, 0.71 with 8 warps; 256 channels 1.78 ms, 4.34 with tiles of 64 x 32; float32 of 128 channels,
# 4096 tokens, 8.8 ms, 15.4 with 8 warps. For 128 channels 8 warps are right: 0.96 ms, 1.79 with 4.
ATTENTION_FORWARD = {
    ("sm_80", 2): {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 3)},
    ("sm_86", 2): {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_90", 2): {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    ("sm_100", 2): {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    ("sm_120", 2): {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    ("gfx942", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 1)},
    ("sm_80", 4): {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    ("sm_86", 4): {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    ("sm_90", 4): {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(16, 16, 8, 1)},
    ("sm_100", 4): {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 1)},
    ("sm_120", 4): {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    ("gfx942", 4): {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
}
# The same for `attention_decode_kernel`. rows: at most; with fewer packed rows its tiles have 16 or 32.
ATTENTION_DECODE = {
    ("sm_80", 2): {64: Tile(64, 64, 4, 4), 128: Tile(64, 32, 4, 4), 256: Tile(64, 32, 4, 3)},
    ("sm_86", 2): {64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 4, 2)},
    ("sm_90", 2): {64: Tile(64, 64, 4, 4), 128: Tile(64, 32, 4, 4), 256: Tile(64, 32, 4, 3)},
    ("sm_100", 2): {64: Tile(64, 64, 4, 4), 128: Tile(64, 32, 4, 4), 256: Tile(64, 32, 4, 3)},
    ("sm_120", 2): {64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 4, 2)},
    ("gfx942", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 4, 1)},
    ("sm_80", 4): {64: Tile(32, 16, 4, 3), 128: Tile(32, 16, 4, 3), 256: Tile(16, 16, 8, 2)},
    ("sm_86", 4): {64: Tile(32, 16, 4, 3), 128: Tile(32, 16, 4, 3), 256: Tile(16, 16, 8, 2)},
    ("sm_90", 4): {64: Tile(32, 16, 4, 3), 128: Tile(32, 16, 4, 3), 256: Tile(16, 16, 8, 2)},
    ("sm_100", 4): {64: Tile(32, 16, 4, 3), 128: Tile(32, 16, 4, 3), 256: Tile(16, 16, 8, 2)},
    ("sm_120", 4): {64: Tile(32, 16, 4, 3), 128: Tile(32, 16, 4, 3), 256: Tile(16, 16, 8, 2)},
    ("gfx942", 4): {64: Tile(32, 16, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
}
# The same for `attention_backward_dq_kernel`. Tiles that need a mask are 16 keys wide.
ATTENTION_BACKWARD_DQ = {
    ("sm_80", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_86", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 4, 2)},
    ("sm_90", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 2)},
    ("sm_100", 2): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_120", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 4, 2)},
    ("gfx942", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 2)},
    ("sm_80", 4): {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 2)},
    ("sm_86", 4): {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 2)},
    ("sm_90", 4): {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 2)},
    ("sm_100", 4): {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 2)},
    ("sm_120", 4): {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 2)},
    ("gfx942", 4): {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
}
# The same for `attention_backward_dk_dv_kernel`; masked tiles have 16 queries. On gfx942 with one stage, since Triton
# 3.6 fails to pipeline the loop in float16 ("failed to translate module to LLVM IR").
ATTENTION_BACKWARD_DK_DV = {
    ("sm_80", 2): {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("sm_86", 2): {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("sm_90", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 64, 8, 2)},
    ("sm_100", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("sm_120", 2): {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("gfx942", 2): {64: Tile(64, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    ("sm_80", 4): {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
    ("sm_86", 4): {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
    ("sm_90", 4): {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
    ("sm_100", 4): {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
    ("sm_120", 4): {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
    ("gfx942", 4): {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
}
ATTENTION_BACKWARD_MASKED = 16


def padded_channels(head_dim: int) -> int:
    """The width of a tile for a head: a power of two, at least the 16 of a matrix instruction."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose(table: dict[tuple[str, int], dict[int, Tile]], architecture: str, element_size: int, channels: int) -> Tile:
    """The tile of a kernel for heads of `channels` columns."""
    by_channels = table[architecture, element_size]
    return by_channels[min(width for width in by_channels if width >= channels)]
