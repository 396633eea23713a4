"""Small CUDA programs (programs.cu) compared with Python: memory spaces, atomics, votes, copies, divergence."""

import functools
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
