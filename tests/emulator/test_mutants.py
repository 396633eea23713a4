"""The tests fail if any single barrier, fence, commit or wait of the CUDA kernels is missing.

A mutant is a kernel without one of its synchronising instructions; where a barrier votes, each thread keeps its own
vote. It runs small cases and is caught if the emulator reports something or stops, or if the results differ. The
kernels therefore do not synchronise more than necessary, with the exceptions in EXPLAINED, and the emulator has no
blind spot where they rely on it. Atomic operations stay: without its semaphore a kernel is another algorithm.
"""

import collections
import dataclasses
import functools
import math
import re
import unittest.mock
from pathlib import Path

import pytest
import test_attention as whole
import test_qk_norm_rotary as rotary
import test_token_shift_norm as shift
import torch
from numerics import nan_filled

from andromeda.ops import _persistent
from andromeda.ops import attention as attention_op
from andromeda.ops import qk_norm_rotary as rotary_op
from andromeda.ops import token_shift_norm as shift_op
from emulator import Device

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
WRAPPERS = ("mma.cuh", "hopper/mbarrier.cuh", "hopper/wgmma.cuh")  # of instructions: their callers say more
SCHEDULES = ("fifo", "reverse", "random")
SYNCHRONISES = re.compile(
    r"\s*(?:@!?%p\d+\s+)?(?:bar|barrier|membar|fence|mbarrier|cp\.async\.(?:bulk\.)?(?:commit|wait)_\w+|"
    r"wgmma\.(?:fence|commit_group|wait_group))\b"
)
VOTE = re.compile(r"\s*barrier\.cta\.red\.(?:and|or)\.pred\s+(\w+), \d+, \d+, (\w+);")

# (kernel, source line): why the kernel is correct without it.
HOPPER_IN_REGISTERS = "attention_forward on Hopper, queries in registers"
DQ_ON_HOPPER = "attention_backward_dq on Hopper"
DKDV_IN_SHARED = "attention_backward_dkdv on Hopper, keys in shared memory"
WAITS_FOR_K = "wait(shared_address(&shared_.k_full[k_.stage]), k_.parity);"
WAITS_FOR_V = "wait(shared_address(&shared_.v_full[v_.stage]), v_.parity);"
ROWS_ARE_FREE = "__syncwarp();  // the other lanes' last reads of these rows are done"
EXPLAINED = {
    ("attention_forward", ROWS_ARE_FREE): (
        "store_rows serves several kernels. Here the block's barrier before the last product with V comes after the "
        "last read of the queries, in whose place it stores."
    ),
    **dict.fromkeys(
        [
            ("attention_forward on Hopper", f"{WAITS_FOR_K} [5]"),
            (HOPPER_IN_REGISTERS, f"{WAITS_FOR_K} [1]"),
            (HOPPER_IN_REGISTERS, f"{WAITS_FOR_V} [1]"),
            (HOPPER_IN_REGISTERS, f"{WAITS_FOR_K} [5]"),
        ],
        "A warpgroup that skips tiles waits for each, or it could get two phases ahead of one that still computes, and "
        "take the end of one phase for that of another. In these cases its next wait holds it back in time.",
    ),
    **dict.fromkeys(
        [
            (kernel, f"fence_products();  // ptxas wants one before each batch [{number}]")
            for kernel in ("attention_forward on Hopper", HOPPER_IN_REGISTERS)
            for number in (1, 2)
        ],
        "No register changes between the two products of a tile, and a fence comes before the first. ptxas 13.0 would "
        "add this fence, with a note that stops the build.",
    ),
    **dict.fromkeys(
        [("attention_forward on Hopper", ROWS_ARE_FREE), (HOPPER_IN_REGISTERS, f"{ROWS_ARE_FREE} [1]")],
        "store_rows serves several kernels. Here it is called once for each panel of an item; before the first one, "
        "barriers of the warp have come since the last item.",
    ),
    **dict.fromkeys(
        [("attention_backward_dkdv", f"{ROWS_ARE_FREE} [{number}]") for number in (1, 2)],
        "store_rows serves several kernels. Here a barrier of the block is just before it.",
    ),
    **dict.fromkeys(
        [(DQ_ON_HOPPER, ROWS_ARE_FREE), *((DKDV_IN_SHARED, f"{ROWS_ARE_FREE} [{number}]") for number in (1, 2))],
        "store_rows serves several kernels. Here a barrier of the warpgroup is just before it.",
    ),
    (DQ_ON_HOPPER, "fence_async_proxy();  // TMA will overwrite what all lanes have read here"): (
        "The emulator wants a proxy fence between an ordinary write and a copy over it, but none between an ordinary "
        "read and a copy over it. PTX wants both."
    ),
    ("attention_backward_dkdv on Hopper", f"{ROWS_ARE_FREE} [2]"): (
        "store_rows serves several kernels. Here the warp read v before it stored dk, and a barrier of the warp comes "
        "between the two stores."
    ),
}


# ---- mutants --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    removed: str  # the source line, numbered where it gives several instructions of a kernel
    text: str  # PTX of the kernel alone


def kernel_text(texts, part_of_name):
    """(entry, text): one kernel of the PTX texts, with the declarations of its file."""
    (text,) = (text for text in texts if part_of_name in text)
    # A brace that ends a block of inline PTX may stand alone in its line too.
    end = r"^}$(?!\s*// end inline asm)"
    kernels = list(re.finditer(rf"^\.visible \.entry (\w+)\(.*?{end}", text, re.MULTILINE | re.DOTALL))
    (own,) = (kernel for kernel in kernels if part_of_name in kernel[1])
    files = re.findall(r"^\s*\.file\s.*$", text, re.MULTILINE)
    return own[1], "\n".join([text[: kernels[0].start()], own[0], *files])


def mutants_of(text):
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))
    lines = text.splitlines()
    found, location = [], None
    for number, line in enumerate(lines):
        if re.match(r"\s*\.loc\s", line):
            location = line
        elif SYNCHRONISES.match(line):
            found.append((number, source_line(location, files)))
    counts, seen = collections.Counter(source for _, source in found), collections.Counter()
    for number, source in found:
        seen[source] += 1
        removed = source if counts[source] == 1 else f"{source} [{seen[source]}]"
        yield Mutant(removed, "\n".join([*lines[:number], *rest_of(lines[number]), *lines[number + 1 :]]))


def rest_of(line):
    """The lines in the place of a removed one. Of a vote, the thread's own predicate is left: its result has a use."""
    vote = VOTE.match(line)
    return [] if vote is None else [f"mov.pred {vote[1]}, {vote[2]};"]


def source_line(location, files):
    """The source line that a .loc names; for a wrapper around inline PTX, the line that calls it."""
    for file, line in re.findall(r"(?:\.loc|inlined_at)\s+(\d+) (\d+)", location):
        _, ours, name = files[file].rpartition("csrc/cuda/")
        if not ours or name in WRAPPERS:
            continue
        if "asm volatile" not in (source := (SOURCES / name).read_text().splitlines()[int(line) - 1]):
            return source.strip()
    raise AssertionError(f"not a place in {SOURCES}: {location}")


# ---- cases ----------------------------------------------------------------------------------------------------------
# Several rounds of every pipeline, warps with and without work, tiles with and without a mask, a ragged end; rows
# aligned to 16 bytes, which are copied asynchronously, and unaligned rows.

SMALL = whole.Case(batch=1, num_heads=1, head_dim=64, dtype=torch.bfloat16, alibi="all")
ONE_MULTIPROCESSOR = Device(8, 0, 1, 163, 164, 2048, 32)  # few blocks, with much to do
HOPPER_OF_ONE = Device(9, 0, 1, 227, 228, 2048, 32)


# Of 576 keys: one document from key 62 on, and one from 512 on, for the last warpgroup of queries: tiles with a mask at
# both ends, tiles without between them, and tiles that only one warpgroup sees, several in a row.
DOCUMENTS = {"mask": "documents", "seed": 5465}


@dataclasses.dataclass(frozen=True)
class Trial:
    run: object  # calls the operator and returns its results
    device: str | Device = "A100"


def attention_arguments(changes):
    case = dataclasses.replace(SMALL, **changes)
    inputs = whole.make(case, torch.device("cpu"))
    options = (inputs.options.get(name) for name in ("alibi_slopes", "logit_bound", "key_start"))
    return inputs, attention_op.Call(*inputs.tensors(), *options, case.causal, case.softmax_scale, "cuda")


def forward(device=ONE_MULTIPROCESSOR, num_splits=0, hidden=None, **changes):
    """hidden: a value of the last key, which the last query alone sees."""
    inputs, call = attention_arguments(changes)
    if hidden is not None:
        inputs.v[:, -1, :, 0] = hidden

    def run():
        with unittest.mock.patch.object(attention_op, "NUM_SPLITS", num_splits):
            return attention_op.forward(call)

    return Trial(run, device)


def backward(device="A100", hidden=None, nan_queries=(), nan_keys=(), **changes):
    """hidden: a number of the last key, which the last query alone sees; nan_queries, nan_keys: these have a NaN."""
    inputs, call = attention_arguments(changes)
    results = attention_op.forward(call._replace(backend="reference"))
    if hidden is not None:
        inputs.dout[:, -1], inputs.k[:, -1, :, 0] = 0.0, hidden
    inputs.q[:, list(nan_queries), :, 0] = math.nan
    inputs.k[:, list(nan_keys), :, 0] = math.nan
    return Trial(functools.partial(attention_op.backward, inputs.dout, *results, call), device)


def backward_with_a_gap(device, **changes):
    """The first 64 queries see keys near their own, all others the last ten keys: between are tiles of keys that no
    group of the first block needs, and others that only one group needs.
    """
    inputs, call = attention_arguments(changes)
    key_start = torch.full(call.q.shape[:2], call.k.shape[1] - 10, dtype=torch.int32)
    key_start[:, :64] = 0
    # The bound makes a window. The logits exceed it, but results are only compared with each other.
    call = call._replace(key_start=key_start, logit_bound=torch.ones(call.q.shape[2]))
    results = attention_op.forward(call._replace(backend="reference"))
    return Trial(functools.partial(attention_op.backward, inputs.dout, *results, call), device)


def rotary_backward(**changes):
    case = dataclasses.replace(rotary.PLAIN, seqlen_q=9, seqlen_k=9, **changes)
    tensors = case.tensors(torch.bfloat16)
    call = rotary_op.Call(*tensors, case.normalize, case.rotary_dim, case.xpos, 0, 4, "cuda")
    return Trial(functools.partial(rotary_op.backward, *rotary.random_like(tensors[:2]), call))


def shift_arguments(changes):
    case = shift.Case("", seqlen=9, **changes)
    tensors, options = case.tensors(torch.bfloat16), case.options(dtype=torch.bfloat16)
    return shift_op.Call(*tensors, options["history"], None, case.alpha, case.shift, case.position, "cuda")


def shift_forward(**changes):
    return Trial(functools.partial(shift_op.forward, shift_arguments(changes)))


def shift_backward(**changes):
    call = shift_arguments(changes)
    return Trial(functools.partial(shift_op.backward, *shift.random_like([call.x] * 2), call))


ROTARY = "qk_norm_rotary_backward_kernelI13__nv_bfloat16LNS0_6AccessE"
SHIFT, CHUNKS, ELEMENTS = "token_shift_norm_", *(f"kernelI13__nv_bfloat16LNS0_6AccessE{access}E" for access in (0, 1))
# name: part of the mangled name; cases
KERNELS = {
    "attention_forward": (
        "attention_forward_kernelI13__nv_bfloat16Li64E",
        lambda: [
            forward(seqlen_q=140, seqlen_k=200),
            forward(seqlen_q=140, seqlen_k=200, layout="offset"),
        ],
    ),
    "attention_forward on Hopper": (
        "attention_forward_wgmma_kernelI13__nv_bfloat16Li64E",
        lambda: [
            forward(HOPPER_OF_ONE, num_splits=-1, seqlen_q=192, seqlen_k=576, num_heads=2, **DOCUMENTS),
            forward(HOPPER_OF_ONE, num_splits=-1, seqlen_q=64, seqlen_k=512, mask="documents", seed=20),  # masks alone
            forward(HOPPER_OF_ONE, num_splits=-1, seqlen_q=40, seqlen_k=300, num_heads=3, hidden=math.inf),
            forward(HOPPER_OF_ONE, num_splits=-1, seqlen_q=70, seqlen_k=70, num_heads=3),
        ],
    ),
    HOPPER_IN_REGISTERS: (
        "attention_forward_wgmma_kernelI13__nv_bfloat16Li128E",
        lambda: [
            forward(HOPPER_OF_ONE, num_splits=-1, seqlen_q=128, seqlen_k=576, num_heads=2, head_dim=128, **DOCUMENTS),
            forward(HOPPER_OF_ONE, num_splits=-1, seqlen_q=70, seqlen_k=400, head_dim=128, hidden=math.inf),
            forward(HOPPER_OF_ONE, num_splits=-1, seqlen_q=70, seqlen_k=70, num_heads=3, head_dim=128),
        ],
    ),
    "attention_decode": (
        "attention_decode_kernelI13__nv_bfloat16Li64ELi2E",
        lambda: [
            forward(seqlen_q=1, seqlen_k=1100, num_heads=20),  # two rounds of the ring
            forward(seqlen_q=1, seqlen_k=1100, num_heads=20, num_splits=17),  # two levels of splits
            forward(seqlen_q=1, seqlen_k=1100, num_heads=20, layout="offset"),
        ],
    ),
    "attention_decode, clusters": (
        "attention_decode_cluster_kernelI13__nv_bfloat16Li64ELi2E",
        lambda: [
            forward("H200", seqlen_q=1, seqlen_k=1300, num_heads=20, num_splits=4),  # two rounds of the ring
            forward("H200", seqlen_q=1, seqlen_k=1100, num_heads=20, num_splits=9),  # two clusters
            forward("H200", seqlen_q=1, seqlen_k=1100, num_heads=20, num_splits=2, layout="offset"),
        ],
    ),
    "attention_backward_dq": (
        "attention_backward_dq_kernelI13__nv_bfloat16Li64ELi2E",
        lambda: [backward(seqlen_q=70, seqlen_k=200), backward(seqlen_q=70, seqlen_k=200, layout="offset")],
    ),
    "attention_backward_dq, one stage": (
        "attention_backward_dq_kernelI13__nv_bfloat16Li128ELi1E",
        lambda: [
            backward(seqlen_q=70, seqlen_k=200, head_dim=128),
            backward(seqlen_q=70, seqlen_k=200, head_dim=128, layout="offset"),
        ],
    ),
    DQ_ON_HOPPER: (
        "attention_backward_dq_wgmma_kernelI13__nv_bfloat16Li64E",
        lambda: [
            backward("H200", seqlen_q=64, seqlen_k=640),  # the second group has no rows, and skips all tiles
            backward("H200", seqlen_q=128, seqlen_k=384, causal=False, alibi="none"),
            backward_with_a_gap("H200", seqlen_q=700, seqlen_k=700, causal=False),
            backward("H200", seqlen_q=100, seqlen_k=600, nan_queries=(3, 70)),  # one warp of each group sees a NaN
            backward("H200", seqlen_q=150, seqlen_k=10),  # a block that sees no key
        ],
    ),
    "attention_backward_dkdv": (
        "attention_backward_dkdv_kernelI13__nv_bfloat16Li64E",
        lambda: [
            backward(seqlen_q=200, seqlen_k=70),
            backward(seqlen_q=200, seqlen_k=70, layout="offset"),
            backward(seqlen_q=70, seqlen_k=40, num_heads=3),  # splits of the heads
            backward(seqlen_q=10, seqlen_k=100, mask="window"),  # keys that no query sees
        ],
    ),
    "attention_backward_dkdv on Hopper": (
        "attention_backward_dkdv_wgmma_kernelI13__nv_bfloat16Li64E",
        lambda: [
            # More tiles than the ring has places; tiles that one group skips.
            backward(HOPPER_OF_ONE, seqlen_q=450, seqlen_k=450),
            backward("H200", seqlen_q=10, seqlen_k=300, mask="window"),  # keys that no query sees
            # In each group one warp finds a NaN; then the ring begins again.
            backward(HOPPER_OF_ONE, seqlen_q=300, seqlen_k=300, nan_keys=(10, 74)),
        ],
    ),
    DKDV_IN_SHARED: (
        "attention_backward_dkdv_wgmma_kernelI13__nv_bfloat16Li128E",
        lambda: [
            backward(HOPPER_OF_ONE, seqlen_q=260, seqlen_k=260, head_dim=128),
            backward(HOPPER_OF_ONE, seqlen_q=250, seqlen_k=250, head_dim=128, nan_keys=(10, 74)),
        ],
    ),
    "qk_norm_rotary_backward": (f"{ROTARY}0ELi1E", lambda: [rotary_backward()]),
    "qk_norm_rotary_backward, long rows": (f"{ROTARY}0ELi2E", lambda: [rotary_backward(head_dim=264)]),
    "qk_norm_rotary_backward, elements": (f"{ROTARY}1ELi2E", lambda: [rotary_backward(head_dim=36)]),
    # Rows of several warps, four of which share a block, two, and one alone, of one tile and of several.
    "token_shift_norm_forward": (
        f"{SHIFT}forward_{CHUNKS}",
        lambda: [shift_forward(dim=dim) for dim in (520, 1032, 8200)],
    ),
    "token_shift_norm_forward, elements": (
        f"{SHIFT}forward_{ELEMENTS}",
        lambda: [shift_forward(dim=dim) for dim in (260, 517, 5121)],
    ),
    "token_shift_norm_backward": (
        f"{SHIFT}backward_{CHUNKS}",
        lambda: [shift_backward(dim=dim) for dim in (520, 1032, 8200)],
    ),
    "token_shift_norm_backward, elements": (
        f"{SHIFT}backward_{ELEMENTS}",
        lambda: [shift_backward(dim=dim) for dim in (260, 517, 5121)],
    ),
}


# ---- the test -------------------------------------------------------------------------------------------------------


def attempt(emulated, trial, schedule):
    """(error, results), one of them None"""
    emulated.settings.device, emulated.settings.schedule = trial.device, schedule
    emulated.reports.clear()
    _persistent.taken_semaphores.clear()
    _persistent.free_semaphores.clear()
    try:
        with nan_filled():
            return None, trial.run()
    except (AssertionError, RuntimeError) as error:
        return str(error), None


def are_same(results, right):
    # Trials with a NaN have some in their results.
    return torch.allclose(results, right, rtol=0, atol=0, equal_nan=True)


def fate(emulated, trials, expected):
    result = "survives"
    for trial, right in zip(trials, expected, strict=True):
        for schedule in SCHEDULES:
            found, results = attempt(emulated, trial, schedule)
            if found is not None:
                return "report"
            if not all(map(are_same, results, right)):
                result = "wrong numbers"
    return result


@pytest.mark.parametrize("name", KERNELS)
def test_every_mutant_is_caught(name, emulated, capsys):
    part_of_name, make_trials = KERNELS[name]
    entry, text = kernel_text(emulated.ptx_texts(), part_of_name)
    trials, expected = make_trials(), []
    with emulated.replaced(entry, text):
        for trial in trials:
            emulated.launches.clear()
            attempts = [attempt(emulated, trial, schedule) for schedule in SCHEDULES]
            assert [found for found, _ in attempts] == [None] * len(SCHEDULES)
            assert entry in [launch.entry for launch in emulated.launches]
            expected.append(attempts[0][1])

    fates = {}
    for mutant in mutants_of(text):
        with emulated.replaced(entry, mutant.text):
            fates[mutant.removed] = fate(emulated, trials, expected)
    assert fates, "the kernel has no such instruction: this entry would test nothing"
    explained = {removed for kernel, removed in EXPLAINED if kernel == name}
    counts = collections.Counter(fates.values())
    with capsys.disabled():
        print(
            f"\n{name}: {len(fates)} mutants, {counts['report']} caught by a report, "
            f"{counts['wrong numbers']} by wrong numbers, {len(explained)} explained"
        )
    survivors = {removed for removed, what in fates.items() if what == "survives"}
    assert survivors - explained == set(), "nothing is wrong without these lines: needless, or the emulator is blind"
    assert explained - survivors == set(), "EXPLAINED has lines that are gone, or needed"
