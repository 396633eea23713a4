"""The table of tiles: every architecture, dtype and head_dim has one that the kernels can take."""

import itertools

import pytest

pytest.importorskip("triton")

from andromeda.triton_kernels import launch, tiles

TABLES = {"forward": tiles.ATTENTION_FORWARD, "decode": tiles.ATTENTION_DECODE}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("architecture", launch.SHARED_MEMORY)
def test_every_head_has_a_tile(architecture, table):
    for size, head_dim in itertools.product((2, 4), (1, 16, 17, 64, 80, 128, 129, 256)):
        channels = tiles.padded_channels(head_dim)
        assert channels >= max(16, head_dim) and channels & (channels - 1) == 0 and channels < max(17, 2 * head_dim)
        tile = tiles.choose(table, architecture, size, channels)
        assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.rows, tile.keys))
        # Tiles of keys and values of the stages in flight: a bound from below on shared memory.
        stages = max(tile.num_stages - 1, 1)
        assert 2 * stages * tile.keys * channels * size <= launch.SHARED_MEMORY[architecture]


def test_no_architecture_without_a_name():
    for table in TABLES.values():
        assert {architecture for architecture, _ in table} == set(launch.SHARED_MEMORY)
