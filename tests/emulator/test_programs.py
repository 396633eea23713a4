"""Small CUDA programs (programs.cu) compared with Python: memory spaces, atomics, votes, copies, divergence."""

import functools
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from emulator import Emulator

SOURCE = Path(__file__).with_name("programs.cu")
GIVEN = [(37 * i + 11) % 64 for i in range(64)] + [3, 7]


@functools.cache
def ptx():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-arch=sm_80", "-ptx", "-o", "-", str(SOURCE)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def signed(value, bits=32):
    value &= (1 << bits) - 1
    return value - (value >> (bits - 1) << bits)


def local_array():
    return [sum(GIVEN[t] * (GIVEN[t + i] & 7) << 8 * i for i in range(3)) for t in range(64)]


def module_variables():
    return [[3, 1, 4, 1][value & 3] for value in GIVEN[:64]] + [35]


def generic_addresses():
    return [GIVEN[t ^ 2] + (t % 2 == 0) for t in range(64)]


def narrow_types():
    words = b"".join(value.to_bytes(4, "little") for value in GIVEN)
    halves = [int.from_bytes(words[2 * t : 2 * t + 2], "little") for t in range(64)]
    packed = bytes(words[t] * 3 & 0xFF for t in range(64))
    narrow = [signed(int.from_bytes(packed[4 * i : 4 * i + 4], "little")) for i in range(16)]
    return [signed(words[t], 8) + halves[t] for t in range(64)] + narrow


def wide_accesses():
    return GIVEN[:64][::-1]


def divergent_loops():
    def steps(value):
        count = 0
        while value not in (0, 1):
            value, count = (value // 2 if value % 2 == 0 else 3 * value + 1), count + 1
        return count

    counts = [steps(value & 31) for value in GIVEN[:64]]
    return [counts[t] + 1000 * sum(c > 10 for c in counts[t // 32 * 32 :][:32]) for t in range(64)]


def atomics():
    total = sum(GIVEN[:64])
    bits = functools.reduce(lambda a, b: a ^ b, GIVEN[:64])
    half = torch.tensor(32.0).view(torch.int32).item()
    return [total, 63, 0, -1, -(1 << 16), bits, 64 % 10, (0 - 64) % 10, 0, 64, half, total, 77]


def block_votes():
    return [sum(value > 30 for value in GIVEN[:64]) + 1000] * 64


def warp_votes():
    result = []
    for t in range(64):
        warp = GIVEN[t // 32 * 32 :][:32]
        odd = 1 + 2 * (63 in warp[1::2]) if t % 2 else 0
        same = sum(value % 5 == GIVEN[t] % 5 for value in warp)
        result.append(sum(warp) - 7 * max(warp) + 10000 * same + 1000000 * odd)
    return result


def warp_scan():
    warps = [GIVEN[:32], GIVEN[32:64]]
    return [sum(warps[t // 32][: t % 32 + 1]) + 100000 * sum(warps[t // 32]) for t in range(64)]


def copies():
    words = b"".join(value.to_bytes(4, "little") for value in GIVEN)
    row = bytearray(words[:256])
    for t in range(4):
        row[32 + 10 * t : 40 + 8 * t] = bytes(8 - 2 * t)
    for t in range(0, 12, 2):
        row[64 + 17 * t : 80 + 16 * t] = bytes(16 - t)
    return [int.from_bytes(row[4 * i : 4 * i + 4], "little") for i in range(64)]


def many_barriers():
    return [GIVEN[i] + GIVEN[i + 32] + 2 * n for n in range(5) for i in range(32)]


PROGRAMS = [local_array, module_variables, generic_addresses, narrow_types, wide_accesses, divergent_loops, atomics]
PROGRAMS += [block_votes, warp_votes, warp_scan, copies, many_barriers]


@pytest.mark.parametrize("schedule", ["fifo", "reverse", "random"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_program(program, schedule):
    expected = program()
    emu = Emulator(schedule=schedule, seed=11)
    start = torch.zeros(160, dtype=torch.int32)
    start[2], start[4] = 1000, -1
    out = emu.tensor(start, name="out", writable=True)
    # Every run has its own text, because variables of a module keep their values.
    text = ptx() + f"// {schedule}\n"
    emu.run_ptx(text, program.__name__, 1, 64, (out, emu.tensor(torch.tensor(GIVEN, dtype=torch.int32), name="in")))
    emu.assert_clean()
    assert out.cpu().tolist()[: len(expected)] == expected


def test_local_memory_is_used():
    assert re.search(r"\.local .*__local_depot", ptx())


# Each block of 32 threads writes its place in the grid and in its cluster, and what it finds at the same place of the
# next block of the cluster: by an address of .shared::cluster, by a generic one, and after atomic operations of it.
CLUSTER = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry program(.param .u64 program_out)
{
  .shared .align 16 .b8 words[256];
  .reg .b32 %r<32>;
  .reg .b64 %rd<8>;
  .reg .pred %p<2>;
  ld.param.u64 %rd1, [program_out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ctaid.y;
  mov.u32 %r4, %nctaid.x;
  mad.lo.u32 %r5, %r3, %r4, %r2;
  mad.lo.u32 %r6, %r5, 32, %r1;
  mul.wide.u32 %rd2, %r6, 64;
  add.u64 %rd1, %rd1, %rd2;
  // The thread, 1000 for each block before this one.
  mad.lo.u32 %r7, %r5, 1000, %r1;
  mov.u32 %r8, words;
  shl.b32 %r9, %r1, 2;
  add.u32 %r8, %r8, %r9;
  st.shared.u32 [%r8], %r7;
  st.shared.u32 [%r8+128], %r7;
  barrier.cluster.arrive.aligned;
  barrier.cluster.wait.aligned;
  mov.u32 %r10, %cluster_ctarank;
  mov.u32 %r11, %cluster_nctarank;
  add.u32 %r12, %r10, 1;
  rem.u32 %r12, %r12, %r11;
  mapa.shared::cluster.u32 %r13, %r8, %r12;
  ld.shared::cluster.u32 %r14, [%r13];
  cvta.shared.u64 %rd3, words;
  cvt.u64.u32 %rd4, %r9;
  add.u64 %rd3, %rd3, %rd4;
  mapa.u64 %rd4, %rd3, %r12;
  ld.u32 %r15, [%rd4];
  getctarank.shared::cluster.u32 %r16, %r13;
  getctarank.u64 %r17, %rd3;
  atom.shared::cluster.add.u32 %r18, [%r13+128], 5;
  barrier.cluster.arrive.aligned;
  barrier.cluster.wait.aligned;
  ld.shared.u32 %r19, [%r8+128];
  mov.u32 %r20, %clusterid.x;
  mov.u32 %r21, %clusterid.y;
  mov.u32 %r22, %nclusterid.x;
  mov.u32 %r23, %nclusterid.y;
  mov.u32 %r24, %cluster_ctaid.x;
  mov.u32 %r25, %cluster_ctaid.y;
  mov.u32 %r26, %cluster_nctaid.x;
  mov.u32 %r27, %cluster_nctaid.y;
  st.global.v4.u32 [%rd1], {%r14, %r15, %r16, %r17};
  st.global.v4.u32 [%rd1+16], {%r18, %r19, %r20, %r21};
  st.global.v4.u32 [%rd1+32], {%r22, %r23, %r24, %r25};
  st.global.v4.u32 [%rd1+48], {%r26, %r27, %r10, %r11};
  ret;
}
"""


@pytest.mark.parametrize(("schedule", "check"), [("fifo", True), ("reverse", True), ("random", True), ("fifo", False)])
def test_clusters(schedule, check):
    """A grid of 4 x 3 blocks in clusters of 2 x 3."""
    emu = Emulator(device="H200", schedule=schedule, check=check)
    out = emu.empty((3, 4, 32, 16), torch.int32, name="out")
    emu.run_ptx(CLUSTER, "program", (4, 3), 32, (out,), cluster=(2, 3))
    emu.assert_clean()
    for y, x, thread in itertools.product(range(3), range(4), range(32)):
        rank = x % 2 + 2 * y
        after = (rank + 1) % 6
        value = thread + 1000 * (x // 2 * 2 + after % 2 + 4 * (after // 2))
        own = thread + 1000 * (x + 4 * y)
        expected = [value, value, after, rank, value, own + 5, x // 2, 0, 2, 1, x % 2, y, 2, 3, rank, 6]
        assert out.memory[y, x, thread].tolist() == expected


def test_a_kernel_requires_its_clusters():
    emu = Emulator(device="H200")
    out = emu.empty((2, 1, 32, 16), torch.int32, name="out")
    text = CLUSTER.replace("(.param .u64 program_out)", "(.param .u64 program_out)\n.reqnctapercluster 1, 2")
    emu.run_ptx(text, "program", (1, 2), 32, (out,))
    emu.assert_clean()
    assert emu.launches[-1].cluster == (1, 2, 1) and out.memory[1, 0, 0, 15] == 2
    with pytest.raises(RuntimeError, match=r"runs in clusters of \(1, 2, 1\) blocks, not of \(2, 1, 1\)"):
        emu.run_ptx(text, "program", (2, 2), 32, (out,), cluster=2)
    with pytest.raises(RuntimeError, match=r"clusters of \(2, 3, 1\) blocks in a grid of \(4, 4, 1\)"):
        emu.run_ptx(CLUSTER, "program", (4, 4), 32, (out,), cluster=(2, 3))
