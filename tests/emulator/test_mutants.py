"""Every barrier, fence, wait and commit of the CUDA kernels is missed when it is gone.

A mutant is a kernel without one of its synchronising instructions. It runs small cases, and is caught when the emulator
reports something, stops, or the results are others. So the kernels have no synchronisation that they do not need,
except for what EXPLAINED says, and the emulator no blind spot where they rely on it. Atomic operations stay: without
its ticket a kernel is another algorithm.
"""

import collections
import dataclasses
import functools
import re
from pathlib import Path

import pytest
import test_attention as whole
import test_qk_norm_rotary as rotary
import torch
from numerics import nan_filled

from andromeda.ops import _select
from andromeda.ops import attention as attention_op
from andromeda.ops import qk_norm_rotary as rotary_op
from emulator import Device

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
SCHEDULES = ("fifo", "reverse", "random")
SYNCHRONISES = re.compile(r"(?:@!?%p\d+\s+)?(?:bar(?:rier)?|membar|fence|mbarrier|cp\.async\.(?:wait|commit|bulk\.\w+_))")

# (kernel, source line): why the kernel is right without it.
EXPLAINED = {}


# ---- mutants --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str  # source line of what is gone, numbered where a kernel has several of the same
    text: str  # a PTX file with nothing but the kernel


def statement_at(location, files):
    """The source line that a .loc names: the kernels' own, also where it is the caller of a header's wrapper."""
    places = re.findall(r"(?:\.loc|inlined_at)\s+(\d+) (\d+)", location)
    for file, line in places:
        path = SOURCES / Path(files[file]).name
        if not path.exists():
            continue
        statement = path.read_text().splitlines()[int(line) - 1].strip()
        if not re.search(r"\basm\b", statement):
            return statement
    raise AssertionError(f"no statement of {SOURCES} at {location}")


def kernel_text(texts, name):
    """(entry, text): one kernel of the PTX texts, with what belongs to all kernels of its file."""
    (text,) = (text for text in texts if f"{name}" in text)
    entry = re.search(rf"\.entry (\w+{name}\w+)", text)[1]
    kernels = list(re.finditer(r"^\.visible \.entry (\w+)\(.*?^}$", text, re.MULTILINE | re.DOTALL))
    (own,) = (kernel[0] for kernel in kernels if kernel[1] == entry)
    files = re.findall(r"^\s*\.file\s.*$", text, re.MULTILINE)
    return entry, "\n".join([text[: kernels[0].start()], own, *files])


def mutants_of(text):
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))
    lines = text.splitlines()
    found, location = [], None
    for number, line in enumerate(lines):
        if re.match(r"\s*\.loc\s", line):
            location = line
        elif SYNCHRONISES.match(line.strip()):
            found.append((number, statement_at(location, files)))
    several = {name for name, count in collections.Counter(name for _, name in found).items() if count > 1}
    seen = collections.Counter()
    for number, name in found:
        seen[name] += 1
        mutated = "\n".join([*lines[:number], "", *lines[number + 1 :]])
        yield Mutant(f"{name} [{seen[name]}]" if name in several else name, mutated)


# ---- cases ----------------------------------------------------------------------------------------------------------

SMALL = whole.Case(batch=1, num_heads=1, head_dim=64, dtype=torch.bfloat16, alibi="all")
LARGE_DEVICE, SMALL_DEVICE = "A100", Device(8, 0, 1, 163, 164, 2048, 32)


@dataclasses.dataclass
class Trial:
    device: str | Device
    run: object  # calls the operation, returns its results


def attention_inputs(bound=None, **changes):
    case = dataclasses.replace(SMALL, **changes)
    inputs = whole.make(case, torch.device("cpu"))
    options = [inputs.options.get(name) for name in ("alibi_slopes", "logit_bound", "key_start")]
    if bound is not None:
        options[1] = torch.full((case.num_heads,), bound)
    return inputs, (*inputs.tensors(), *options), (case.causal, case.softmax_scale, "cuda")


def forward(device=SMALL_DEVICE, **changes):
    _, tensors, options = attention_inputs(**changes)
    return Trial(device, functools.partial(attention_op._forward, *tensors, *options))


def backward(device=LARGE_DEVICE, **changes):
    inputs, tensors, options = attention_inputs(**changes)

    def run():
        return attention_op._backward(inputs.dout, *tensors[:3], *run.forward, *tensors[3:], *options)

    run.forward = attention_op._forward(*tensors, *options[:2], "reference")
    return Trial(device, run)


def rotary_backward(**changes):
    case = dataclasses.replace(rotary.PLAIN, **changes)
    q, k, *rest = case.tensors(torch.bfloat16)
    raise NotImplementedError(q, k, rest)


KERNELS = {
    "attention_forward_kernelI13__nv_bfloat16Li64E": lambda: [
        forward(seqlen_q=140, seqlen_k=200),
        forward(seqlen_q=140, seqlen_k=200, layout="offset"),
    ],
    "attention_decode_kernelI13__nv_bfloat16Li64ELi2E": lambda: [
        forward(seqlen_q=1, seqlen_k=1100, num_heads=20, device=LARGE_DEVICE),
        forward(seqlen_q=1, seqlen_k=1100, num_heads=20, layout="offset", device=SMALL_DEVICE),
        forward(seqlen_q=1, seqlen_k=1100, num_heads=20, device=SMALL_DEVICE),
    ],
    "attention_backward_dq_kernelI13__nv_bfloat16Li64E": lambda: [
        backward(seqlen_q=70, seqlen_k=200),
        backward(seqlen_q=70, seqlen_k=200, layout="offset"),
    ],
    "attention_backward_dkdv_kernelI13__nv_bfloat16Li64E": lambda: [
        backward(seqlen_q=200, seqlen_k=70),
        backward(seqlen_q=200, seqlen_k=70, layout="offset"),
        backward(seqlen_q=70, seqlen_k=40, num_heads=3),
    ],
}


# ---- the test -------------------------------------------------------------------------------------------------------


def attempt(emulated, trial, schedule):
    """What was reported, and the results."""
    emulated.settings.device, emulated.settings.schedule = trial.device, schedule
    emulated.reports.clear()
    _select._tickets.clear()
    try:
        with nan_filled():
            results = trial.run()
    except (AssertionError, RuntimeError) as error:
        return [str(error)], None
    return [], results


def fate(emulated, trials, expected):
    """report, numbers, or survives."""
    outcome = "survives"
    for trial, right in zip(trials, expected, strict=True):
        for schedule in SCHEDULES:
            reports, results = attempt(emulated, trial, schedule)
            if reports:
                return "report"
            if not all(map(torch.equal, results, right)):
                outcome = "numbers"
    return outcome


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_removed_is_missed(name, emulated, capsys):
    entry, text = kernel_text(emulated.ptx_texts(), name)
    trials = KERNELS[name]()
    expected = []
    for trial in trials:
        attempts = [attempt(emulated, trial, schedule) for schedule in SCHEDULES]
        assert [reports for reports, _ in attempts] == [[]] * len(SCHEDULES)
        expected.append(attempts[0][1])
    assert any(launch.entry == entry for launch in emulated.launches)
    fates = {}
    for mutant in mutants_of(text):
        with emulated.replaced(entry, mutant.text):
            fates[mutant.name] = fate(emulated, trials, expected)
    with capsys.disabled():
        print()
        for m, f in fates.items():
            print(f"{f:10} {m}")
