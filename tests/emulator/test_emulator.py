"""The emulator reports every kernel of defects.cu that has its defect, and reports nothing if it has not."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from emulator import Device, Emulator

SOURCE = Path(__file__).with_name("defects.cu")

# kernel: kinds, one of which must be reported. THREADS and BLOCKS hold sizes other than 64 threads and one block.
AMPERE = {
    "read_before_write": {"race-raw", "uninitialised"},
    "write_after_read": {"race-war"},
    "write_after_write": {"race-waw"},
    "no_warp_barrier": {"race-raw"},
    "shuffle_is_no_barrier": {"race-raw"},
    "different_values": {"race-waw"},
    "never_written": {"uninitialised"},
    "copy_not_awaited": {"async-race"},
    "copy_of_another_thread": {"race-raw", "async-race"},
    "write_over_copy": {"async-race"},
    "exit_with_copy": {"leak"},
    "read_outside": {"out-of-bounds"},
    "write_outside": {"out-of-bounds"},
    "shared_outside": {"out-of-bounds"},
    "misaligned": {"misaligned"},
    "write_to_input": {"read-only"},
    "half_a_warp": {"divergence"},
    "counts_differ": {"barrier"},
    "nobody_comes": {"deadlock"},
    "exit_before_barrier": {"barrier"},
    "shuffle_from_outside": {"shuffle"},
    "same_word": {"block-race"},
    "ticket_without_fence": {"block-race"},
    "ticket_fenced_by_others": {"block-race"},
    "ticket_without_barrier": {"block-race"},
    "ticket_without_second_fence": {"block-race"},
    "ticket_fenced_behind_the_barrier": {"block-race"},
    "ticket_then_copies": {"block-race"},
    "flag_without_fence": {"block-race"},
    "flag_without_acquire": {"block-race"},
    "flag_that_nobody_sets": {"deadlock"},
    "turn_without_release": {"block-race"},
    "chain_without_fence": {"block-race"},
    "overwritten_too_early": {"block-race"},
    "release_of_another_word": {"block-race"},
}
HOPPER = {
    "one_lane_arrives": {"race-raw"},
    "too_many_arrivals": {"mbarrier"},
    "init_not_ordered": {"race-raw", "mbarrier"},
    "init_not_fenced": {"proxy"},
    "bytes_missing": {"deadlock"},
    "load_not_awaited": {"async-race"},
    "store_not_fenced": {"proxy"},
    "store_not_awaited": {"async-race"},
    "two_lanes_issue": {"tma"},
    "exit_with_bulk_store": {"leak"},
    "no_wgmma_fence": {"wgmma"},
    "no_proxy_fence": {"proxy"},
    "no_wgmma_wait": {"wgmma"},
    "three_warps": {"wgmma"},
    "other_descriptor": {"wgmma"},
    "changed_a": {"wgmma"},
    "changed_b": {"async-race"},
    "reused_a": {"async-race", "race-war", "race-raw"},
    "descriptor_outside": {"out-of-bounds"},
    "seeded_late": {"slow"},
    "too_many_registers": {"deadlock"},
}
CLUSTER = {
    "peer_not_started": {"cluster"},
    "peer_not_ordered": {"race-raw"},
    "relaxed_arrival": {"race-raw"},
    "peer_exits": {"cluster"},
    "two_arrivals": {"barrier"},
    "address_of_another_block": {"out-of-bounds"},
    "init_not_fenced_for_peers": {"race-raw"},
    "arrival_without_scope": {"race-raw"},
    "wait_without_scope": {"race-raw"},
    "store_async_not_awaited": {"async-race"},
    "reduction_not_awaited": {"async-race"},
    "copy_of_ordinary_writes": {"proxy"},
    "source_reused": {"async-race"},
    "copy_from_peer_not_awaited": {"async-race"},
    "multicast_not_awaited": {"async-race"},
    "exit_with_incoming_copy": {"leak", "cluster"},
}
PROGRAMMATIC = {
    "read_before_grid_wait": {"grid-dependency"},
    "write_before_grid_wait": {"grid-dependency"},
    "grid_wait_of_another_thread": {"grid-dependency"},
    "no_grid_wait": {"grid-dependency"},
}
KINDS = AMPERE | HOPPER | CLUSTER | PROGRAMMATIC
WGMMA = list(HOPPER)[10:-1]
THREADS = dict.fromkeys(WGMMA, 128) | {"too_many_registers": 384}
BLOCKS = dict.fromkeys(list(AMPERE)[list(AMPERE).index("same_word") :], 2)
BLOCKS |= {"turn_without_release": 5, "chain_without_fence": 3} | dict.fromkeys(CLUSTER, 4)


@functools.cache
def ptx(architecture):
    """The PTX of defects.cu."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    target = ["-arch=sm_80"] if architecture == 80 else ["-gencode=arch=compute_90a,code=sm_90a"]
    command = [nvcc, "-std=c++17", "-O3", "-lineinfo", *target, "-ptx", "-o", "-", str(SOURCE)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run(text, name, defect, **settings):
    """The reports of one kernel of defects.cu, and its output."""
    emu, out = run_on(Emulator(**settings), text, name, defect)
    return emu.reports, out


def run_on(emu, text, name, defect):
    out = emu.empty((256,), torch.float32, name="out")
    given = emu.tensor(torch.arange(64.0), name="in")
    entry = re.search(rf"\.entry (_Z\d+{name}ILb{int(defect)}E\w+)", text)[1]
    launch = {"cluster": 2 if name in CLUSTER else 1, "programmatic": name in PROGRAMMATIC}
    emu.run_ptx(text, entry, BLOCKS.get(name, 1), THREADS.get(name, 64), (out, given), **launch)
    return emu, out.cpu()


@pytest.mark.parametrize("schedule", ["fifo", "reverse", "random"])
@pytest.mark.parametrize("name", KINDS)
def test_repaired_kernels_are_clean(name, schedule):
    reports, _ = run(ptx(80 if name in AMPERE else 90), name, False, schedule=schedule, seed=5)
    assert reports == []


@pytest.mark.parametrize("name", KINDS)
def test_defects_are_reported(name):
    reports, _ = run(ptx(80 if name in AMPERE else 90), name, True)
    kinds = {report.kind for report in reports}
    assert kinds & KINDS[name], reports


@pytest.mark.parametrize("schedule", ["fifo", "reverse", "random"])
def test_races_need_no_unlucky_schedule(schedule):
    for name in ("write_after_read", "write_after_write", "no_warp_barrier", "copy_of_another_thread"):
        reports, _ = run(ptx(80), name, True, schedule=schedule, seed=3)
        assert {report.kind for report in reports} & AMPERE[name], (name, reports)


def test_a_report_names_both_parties():
    (report,) = (report for report in run(ptx(80), "write_after_read", True)[0] if report.kind == "race-war")
    lines = SOURCE.read_text().splitlines()
    read = next(number for number, line in enumerate(lines, 1) if "other = row" in line)
    assert "other + 1" in lines[report.line - 1]
    assert re.search(r"block \(0, 0, 0\) thread \d+: shared memory, byte \d+", report.text)
    assert f"the read by thread {63 - int(re.search('thread ([0-9]+):', report.text)[1])}" in report.text
    assert f"at defects.cu:{read}" in report.text


def test_results_without_checks():
    reports, out = run(ptx(80), "write_after_read", True, check=False)
    assert reports == []
    assert torch.isfinite(out[:64]).all()


@pytest.mark.parametrize("name", ["ticket_without_fence", "ticket_then_copies"])
def test_bytes_that_one_block_reads_of_others(name):
    """The last of the two blocks reads 64 numbers of the other; its own numbers do not count."""
    for schedule in ("fifo", "reverse"):
        emu, _ = run_on(Emulator(schedule=schedule), ptx(80), name, False)
        assert emu.launches[-1].counters.foreign_bytes == 256
    emu, _ = run_on(Emulator(), ptx(80), "same_word", False)
    assert emu.launches[-1].counters.foreign_bytes == 0


@pytest.mark.parametrize(
    ("name", "clocks"),
    [
        # 256 bytes in and out; loads and stores of two warps; two stores of one thread
        ("bytes_missing", 2 + 2 + 4 + 2),
        ("changed_b", 32 + 4 + 16 + 2 + 2),  # stores that make A and B; A, B, and B again for A in registers
    ],
)
def test_clocks_of_bulk_copies_and_wgmma(name, clocks):
    emu, _ = run_on(Emulator(), ptx(90), name, False)
    assert emu.launches[0].counters.shared_clocks == clocks


def test_a_block_waits_for_one_that_has_not_started():
    """Block 4 comes first and waits for block 3, and so on: the device must hold all five at once."""

    def run_with(multiprocessors):
        device = Device(8, 0, multiprocessors, 163, 164, threads_per_multiprocessor=128, blocks_per_multiprocessor=32)
        return run_on(Emulator(device=device, schedule="reverse"), ptx(80), "turn_without_release", False)

    emu, out = run_with(multiprocessors=3)
    emu.assert_clean()
    assert torch.equal(out[:64], 5 * torch.arange(64.0))
    emu, _ = run_with(multiprocessors=2)
    (report,) = emu.reports
    assert report.kind == "deadlock"
    assert re.search(r"block \(1, 0, 0\); warp 0 waits at defects.cu:\d+ for a change of done \+ 0", report.text)
    assert "block (0, 0, 0) is the next of 1 that have not started: the device holds 4" in report.text
    (report,) = run(ptx(80), "flag_without_acquire", False, blocks=(1,))[0]
    assert "no block changes what others wait for; warp 0 waits at" in report.text


def test_unwritten_memory_is_nan():
    _, out = run(ptx(80), "same_word", False)
    assert torch.isnan(out[128:]).all()


def test_chosen_blocks():
    _, out = run(ptx(80), "same_word", False, blocks=(1,))
    assert torch.isnan(out[:64]).all()
    assert torch.equal(out[64:128], 1000 + torch.arange(64.0))


UNKNOWN = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k()
{{
  .reg .b32 %r<4>;
  .reg .f32 %f<4>;
  .reg .pred %p<4>;
  {statement};
  ret;
}}
"""


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("frobnicate.b32 %r1, %r2", "unknown instruction: frobnicate.b32"),
        ("add.fancy.f32 %f1, %f2, %f3", "modifier .fancy is not known here: add.fancy.f32"),
        ("add.f32 %f1, %f2, %r9", "unknown name %r9|unknown register: %r9"),
        ("add.u32 %r1, %r2, %p1", "a register of 0 bytes where 4 are needed"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 %f1, %f1, %f1, %f1", "this shape is not supported"),
        ("bra nowhere", "unknown name nowhere"),
    ],
)
def test_unknown_instructions_stop_with_their_text_and_line(statement, message):
    emu = Emulator()
    with pytest.raises(RuntimeError, match=r"PTX line 10: (" + message + ")"):
        emu.run_ptx(UNKNOWN.format(statement=statement), "k", 1, 32, ())


def test_a_body_without_a_mistake_is_not_disturbed_by_others():
    emu = Emulator()
    text = (
        UNKNOWN.format(statement="frobnicate.b32 %r1, %r2")
        + UNKNOWN.format(statement="mov.u32 %r1, 1").replace("entry k", "entry good").split(".address_size 64")[1]
    )
    emu.run_ptx(text, "good", 1, 32, ())
    emu.assert_clean()


def test_a_call_stops_where_it_is_made():
    emu = Emulator()
    with pytest.raises(RuntimeError, match="calls of functions are not supported"):
        emu.run_ptx(UNKNOWN.format(statement="call.uni vprintf, (%r1)"), "k", 1, 32, ())
