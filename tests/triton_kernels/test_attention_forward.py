"""The Triton kernel of attention for many query rows, in the emulator: against the float64 reference, on the code for
an A100 (`mma`) and for an H200 (`wgmma`).

Every combination of dtype, head_dim, mask and absent arguments is compiled for itself: cases share them.
"""

import dataclasses
import math
import subprocess
import tempfile
from pathlib import Path

import numerics
import pytest
import test_attention as whole
import torch
from emulator.test_attention import (
    HIDDEN,
    LONG,
    check_visible_numbers,
    check_windows_skip_far_keys,
    small,
)
from op_cases import BFLOAT16, FLOAT16, FLOAT32, make
from test_attention import bounded, check_forward

from andromeda.ops import attention as op
from andromeda.ops.attention import attention

triton = pytest.importorskip("triton")

DEVICES = ("A100", "H200")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _never_decode(monkeypatch):
    monkeypatch.setattr(op, "NUM_SPLITS", -1)


@pytest.fixture(params=DEVICES)
def gpu(request, emulated_triton):
    emulated_triton.settings.device = request.param
    return emulated_triton


def emulate(gpu, case):
    """Every case has its own order of warps and copies, the same in every run."""
    gpu.settings.schedule = ("fifo", "reverse", "random")[sum(map(ord, str(case))) % 3]


def on_devices_in_turn(cases):
    """(case, device): the devices take turns."""
    return [
        pytest.param(case, DEVICES[index % 2], id=f"{DEVICES[index % 2]}-{case}") for index, case in enumerate(cases)
    ]


# Tiles are 128 or 64 queries and 64 keys.
LENGTHS = [(1, 70), (33, 33), (64, 64), (65, 65), (128, 128), (129, 257), (200, 64), (70, 300)]


@pytest.mark.parametrize("case", [small(seqlen_q=n, seqlen_k=t) for n, t in LENGTHS], ids=str)
def test_lengths(case, gpu):
    emulate(gpu, case)
    check_forward(make(case, CPU), "triton")
    assert [launch.kernel for launch in gpu.launches] == ["attention_forward_kernel"]


CASES = [small(batch=2, seqlen_q=33, seqlen_k=70, num_heads=h, num_kv_heads=g) for h, g in ((4, 2), (8, 8), (12, 1))]
CASES += [
    small(batch=2, seqlen_q=n, seqlen_k=130, alibi="all", causal=causal, mask=mask)
    for mask in ("documents", "padding", "window", "ahead", "blind")
    for n in (60, 150)
    for causal in (True, False)
]
CASES += [small(seqlen_q=150, seqlen_k=130, alibi="none", causal=causal) for causal in (True, True, False, False)]
CASES += [
    small(batch=2, seqlen_q=70, seqlen_k=130, num_heads=4, num_kv_heads=2, layout=layout)
    for layout in ("transposed", "slice", "seqlen first", "offset", "expanded")
]
CASES += [
    small(seqlen_q=80, seqlen_k=100, head_dim=d, dtype=dtype)
    for dtype, widths in (
        (BFLOAT16, (16, 24, 80, 128, 128, 256, 256)),
        (FLOAT32, (16, 64, 128, 256)),
        (FLOAT16, (64, 64)),
    )
    for d in widths
]
CASES += [small(seqlen_q=90, seqlen_k=200, dtype=FLOAT32, mask="documents", causal=False, num_heads=2)] * 2
CASES += [dataclasses.replace(LONG, dtype=FLOAT32, seqlen_q=100, seqlen_k=150)] * 2


@pytest.mark.parametrize("case, device", on_devices_in_turn(CASES))
def test_matches_the_reference(case, device, emulated_triton):
    emulated_triton.settings.device = device
    emulate(emulated_triton, case)
    check_forward(make(case, CPU), "triton", values=whole.rules_for(case, "triton"))


# Half precision is bounded up to 40 (bfloat16) and 7 (float16).
BOUNDED = [
    (LONG, 1.0, False),
    (LONG, 10.0, True),
    (LONG, 39.0, True),
    (LONG, 60.0, True),
    (dataclasses.replace(LONG, dtype=FLOAT16), 6.9, True),
    (dataclasses.replace(LONG, dtype=FLOAT16), 30.0, False),
    (dataclasses.replace(LONG, causal=False), 5.0, True),
    (dataclasses.replace(LONG, causal=False, alibi="all"), 1.0, False),
    (dataclasses.replace(LONG, seqlen_q=300, seqlen_k=120), 2.0, False),  # early rows have no key of their own
    (dataclasses.replace(LONG, mask="documents"), 4.0, False),
    (dataclasses.replace(LONG, mask="window"), 4.0, True),
    (dataclasses.replace(LONG, mask="ahead", causal=False), 4.0, True),  # the row's own key is hidden: no window holds
    (dataclasses.replace(LONG, mask="blind"), 4.0, False),
    (dataclasses.replace(LONG, dtype=FLOAT32, seqlen_q=200, seqlen_k=200), 20.0, True),
]


def check_beside_plain(inputs, values="heavy"):
    """Large logits concentrate the weights: at most twice the error of plain torch."""
    scale = inputs.q.shape[-1] ** -0.5
    out, _ = check_forward(inputs, "triton", values=values)
    numerics.assert_no_worse(out, whole.run_exact(inputs, scale, out.dtype)[0], whole.run_exact(inputs, scale)[0])


@pytest.mark.parametrize(
    "case, bound, adversarial, device",
    [(*each, DEVICES[index % 2]) for index, each in enumerate(BOUNDED)],
    ids=str,
)
def test_logit_bound(case, bound, adversarial, device, emulated_triton):
    emulated_triton.settings.device = device
    emulate(emulated_triton, case)
    inputs = bounded(case, bound, CPU, adversarial)
    if whole.rounds_weights("triton", case.dtype) and (adversarial or bound > 10):
        check_beside_plain(inputs)
    else:
        check_forward(inputs, "triton")


@pytest.mark.parametrize("promise", [math.inf, math.nan, -1.0], ids=str)
def test_logit_bound_that_promises_nothing(promise, emulated_triton):
    inputs = make(small(seqlen_q=64, seqlen_k=64, values="peaked"), CPU)
    inputs.options["logit_bound"] = torch.full((3,), promise)
    check_beside_plain(inputs)


def test_windows_skip_far_keys(gpu):
    check_windows_skip_far_keys(400, "triton")


@pytest.mark.parametrize("values", ["peaked", "flat", "huge key", "ties", "offset", "heavy"])
def test_odd_values(values, gpu):
    case = small(seqlen_q=100, seqlen_k=100, values=values)
    emulate(gpu, case)
    check_beside_plain(make(case, CPU), values)


@pytest.mark.parametrize("softmax_scale", [1, 0.05, 2.0**-20], ids=str)
def test_softmax_scale_is_not_applied_to_the_bias(softmax_scale, emulated_triton):
    inputs = make(small(seqlen_q=40, seqlen_k=110, alibi="all"), CPU)
    check_forward(inputs, "triton", softmax_scale=softmax_scale, values="heavy" if softmax_scale == 1 else "normal")


def test_what_the_kernels_refuse(emulated_triton):
    inputs = make(small(), CPU)
    for scale in (0.0, -0.3, 2.0**-61):
        with pytest.raises(NotImplementedError, match=r"softmax_scale=.*built for at least 2\*\*-60"):
            attention(*inputs.tensors(), softmax_scale=scale, backend="triton")
    wide = make(small(head_dim=257), CPU).tensors()
    assert op.unsupported("triton", *wide) == ["head_dim=257 (built for 1 to 256)"]
    q = inputs.q[:, :1].expand(1, 2**30 + 1, 3, 64)
    assert op.unsupported("triton", q, *inputs.tensors()[1:]) == [f"seqlen_q={2**30 + 1} (built for up to 2**30)"]
    assert op.unsupported("triton", q[:, : 2**30], *inputs.tensors()[1:]) == []


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("case, device", on_devices_in_turn([HIDDEN[0], HIDDEN[2], HIDDEN[3], HIDDEN[4]]))
def test_hidden_numbers_stay_hidden(case, device, name, emulated_triton):
    emulated_triton.settings.device = device
    inputs = make(dataclasses.replace(case, head_dim=64, dtype=BFLOAT16), CPU)
    seqlen = getattr(inputs, name).shape[1]
    for index, row in enumerate((0, seqlen // 2, seqlen - 1)):
        spoilt = whole.change(inputs, **{name: getattr(inputs, name).clone()})
        channel = slice(None) if index == 1 else (37 * index + 5) % 64
        whole.check_hidden(spoilt, "triton", name, 0, row, 0, channel, whole.NOT_FINITE[index])


def test_visible_numbers_are_not_hidden(gpu):
    check_visible_numbers("triton")


def test_schedules_change_no_bit(gpu):
    inputs = make(small(seqlen_q=200, seqlen_k=200), CPU)
    results = []
    for schedule, seed in (("fifo", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        gpu.settings.schedule, gpu.settings.seed = schedule, seed
        results.append(attention(*inputs.tensors(), **inputs.options, backend="triton"))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def place_far_apart(gpu, inputs, monkeypatch):
    """The same q, k and v; the second batch entry is 3 * 2^30 elements after the first. An offset that is computed in
    32 bits is outside every buffer. Memory is taken only where it is accessed."""
    stride, near = 3 * 2**30, gpu.tensor
    memory = torch.empty(stride + 2**16, dtype=inputs.q.dtype)

    def place(tensor, start):
        far = memory[start:].as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
        far.copy_(tensor)
        return far

    def copy(tensor, *, name, **options):
        if tensor.numel() == 0 or max(tensor.stride()) < stride:
            return near(tensor, name=name, **options)
        far = gpu.sparse(tensor.shape, tensor.dtype, name=name, strides=tensor.stride())
        far.memory.copy_(tensor)
        return far

    monkeypatch.setattr(gpu, "tensor", copy)
    tensors = (place(tensor, 2**14 * index) for index, tensor in enumerate(inputs.tensors()))
    return whole.Inputs(*tensors, inputs.dout, inputs.options)


def test_offsets_beyond_32_bits(gpu, monkeypatch):
    inputs = make(small(batch=2, seqlen_q=40, seqlen_k=90, num_heads=2), CPU)
    expected = attention(*inputs.tensors(), **inputs.options, backend="triton")
    far = place_far_apart(gpu, inputs, monkeypatch)
    assert torch.equal(attention(*far.tensors(), **far.options, backend="triton"), expected)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_on_hopper_overlap(head_dim, emulated_triton):
    """If the code between two products writes an accumulator, ptxas lets every product wait for the one before."""
    from andromeda.triton_kernels.attention_forward import attention_forward_kernel as kernel

    emulated_triton.settings.device = "H200"
    kernel.device_caches.clear()
    inputs = bounded(small(seqlen_q=40, seqlen_k=40, head_dim=head_dim), 1.0, CPU)
    attention(*inputs.tensors(), **inputs.options, backend="triton")
    (programs,) = (cache[0] for cache in kernel.device_caches.values())
    (program,) = programs.values()
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        command = [disassembler, "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert 0 < text.count("WARPGROUP.DEPBAR") <= text.count("HGMMA") / 2


def test_a_length_does_not_compile_again(gpu):
    """Only what changes the code may: a growing cache must not."""
    from andromeda.triton_kernels.attention_forward import attention_forward_kernel as kernel

    def variants():
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    counts = set()
    for seqlen_q, seqlen_k in ((33, 64), (33, 65), (64, 1), (1, 16), (48, 48)):
        attention(*make(small(seqlen_q=seqlen_q, seqlen_k=seqlen_k), CPU).tensors(), causal=True, backend="triton")
        counts.add(variants())
    assert len(counts) == 1
