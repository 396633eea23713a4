"""The Triton kernels of attention's backward pass, in the emulator: against the float64 reference, by the operator, on
the code for an A100 (`mma`) and for an H200 (`wgmma`).

Every combination of dtype, head_dim, mask and absent arguments is compiled for itself: cases share them.
"""

import dataclasses
import math

import pytest
import test_attention as whole
import torch
from emulator.test_attention import HIDDEN, LONG, alternate, small
from op_cases import BFLOAT16, FLOAT16, FLOAT32, Inputs, make
from test_attention import bounded, check, check_beside_plain

from andromeda.ops import attention as op
from andromeda.reference import attention as reference

DEVICES = ("A100", "H200")
CPU = torch.device("cpu")
KERNELS = ["attention_backward_dq_kernel", "attention_backward_dk_dv_kernel", "attention_backward_sum_kernel"]


RUN_BOTH = whole.run


def exact_forward(inputs, softmax_scale=None):
    """out and softmax_lse, rounded."""
    scale = inputs.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = {name: value for name, value in inputs.options.items() if name != "logit_bound"}
    wide = [tensor.double() for tensor in inputs.tensors()]
    out, lse = reference.attention(*wide, softmax_scale=scale, **options)
    return out.to(inputs.q.dtype), lse.float()


def backward(inputs, out, lse, backend="triton", softmax_scale=None):
    scale = inputs.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = [inputs.options.get(name) for name in ("alibi_slopes", "logit_bound", "key_start")]
    call = op.Call(*inputs.tensors(), *options, inputs.options["causal"], scale, backend)
    return op.BACKWARD(inputs.dout, out, lse, *call)


def run(inputs, backend, softmax_scale=None):
    """As `run` of tests/test_attention.py, but the forward pass is the exact one."""
    out, lse = exact_forward(inputs, softmax_scale)
    return out, lse, *backward(inputs, out, lse, backend, softmax_scale)


@pytest.fixture(autouse=True)
def _backward_alone(monkeypatch):
    monkeypatch.setattr(whole, "run", run)


@pytest.fixture(params=DEVICES)
def gpu(request, emulated_triton):
    emulated_triton.settings.device = request.param
    return emulated_triton


def emulate(gpu, case):
    """Every case has its own order of warps and copies, the same in every run."""
    gpu.settings.schedule = ("fifo", "reverse", "random")[sum(map(ord, str(case))) % 3]


def in_turn(*cases):
    """Parameters case and device: the devices take turns."""
    return [
        pytest.param(case, DEVICES[index % 2], id=f"{DEVICES[index % 2]}-{case}") for index, case in enumerate(cases)
    ]


# Tiles are 64 or 128 queries and keys, 16 where they are masked.
LENGTHS = [(1, 70), (33, 33), (64, 64), (65, 65), (129, 257), (200, 64), (257, 1), (70, 300)]
CASES = alternate([small(seqlen_q=n, seqlen_k=t) for n, t in LENGTHS for _ in DEVICES])
CASES += [small(seqlen_q=600, seqlen_k=600, num_heads=1, alibi="all")] * 2  # a pipeline of many tiles
CASES += [small(seqlen_q=n, seqlen_k=t, causal=False) for n, t in ((130, 100), (100, 130), (1, 65), (90, 1))]
CASES += [small(batch=2, seqlen_q=33, seqlen_k=70, num_heads=h, num_kv_heads=g) for h, g in ((4, 2), (8, 8), (12, 1))]
CASES += [
    small(batch=2, seqlen_q=n, seqlen_k=130, alibi="all", causal=causal, mask=mask)
    for mask in ("documents", "padding", "window", "ahead", "blind")
    for n, causal in ((60, True), (150, True), (60, False), (150, False))
]
CASES += [small(seqlen_q=150, seqlen_k=130, alibi="none", causal=causal) for causal in (True, False)]
CASES += [
    small(batch=2, seqlen_q=70, seqlen_k=130, num_heads=4, num_kv_heads=2, layout=layout)
    for layout in ("transposed", "slice", "seqlen first", "offset", "expanded")
]
CASES += [
    small(seqlen_q=80, seqlen_k=100, head_dim=d, dtype=dtype)
    for dtype, widths in (
        (BFLOAT16, (20, 80, 128, 128, 256, 256)),
        (FLOAT32, (128, 256)),
        (FLOAT16, (128,)),
    )
    for d in widths
]
CASES += [small(seqlen_q=70, seqlen_k=100, dtype=FLOAT32, mask="documents", causal=False, num_heads=2)]


@pytest.mark.parametrize("case, device", in_turn(*CASES))
def test_matches_the_reference(case, device, emulated_triton):
    emulated_triton.settings.device = device
    emulate(emulated_triton, case)
    check(make(case, CPU), "triton", values=whole.rules_for(case, "triton"))
    shared = case.num_heads > case.num_kv_heads  # few programs: each head of a key head is a share
    assert [launch.kernel for launch in emulated_triton.launches] == KERNELS[: 3 if shared else 2]


ODD_VALUES = alternate([small(seqlen_q=n, seqlen_k=120, values=v) for n, v in zip(
    (120, 120, 40, 120, 40, 120), ("peaked", "flat", "huge key", "ties", "offset", "heavy"), strict=True
)])  # fmt: skip


@pytest.mark.parametrize("case, device", in_turn(*ODD_VALUES))
def test_odd_values(case, device, emulated_triton):
    emulated_triton.settings.device = device
    check_beside_plain(make(case, CPU), "triton", case.values)


@pytest.mark.parametrize("softmax_scale", [1, 2.0**-20], ids=str)
def test_softmax_scale_is_not_applied_to_the_bias(softmax_scale, emulated_triton):
    inputs = make(small(seqlen_q=40, seqlen_k=110, alibi="all"), CPU)
    check_beside_plain(inputs, "triton", "normal" if softmax_scale < 1 else "peaked", softmax_scale)


# ---- windows --------------------------------------------------------------------------------------------------------

BOUNDED = [
    (LONG, 1.0, False),
    (LONG, 10.0, True),
    (dataclasses.replace(LONG, causal=False, alibi="all"), 1.0, True),
    # Rows before the first key: no window holds for them.
    (dataclasses.replace(LONG, seqlen_q=300, seqlen_k=120, causal=False, alibi="all"), 1.0, False),
    (dataclasses.replace(LONG, mask="documents"), 4.0, False),
    (dataclasses.replace(LONG, mask="window"), 4.0, True),
    (dataclasses.replace(LONG, mask="ahead", causal=False, alibi="all"), 1.0, False),  # no row sees its own key
    (dataclasses.replace(LONG, mask="documents", causal=False, alibi="all"), 1.0, True),
    (dataclasses.replace(LONG, mask="blind"), 4.0, False),
    (dataclasses.replace(LONG, seqlen_q=300, seqlen_k=120), 2.0, False),  # early rows have no key of their own
]


@pytest.mark.parametrize(
    "case, bound, adversarial, device", [(*each, DEVICES[i % 2]) for i, each in enumerate(BOUNDED)], ids=str
)
def test_windows_leave_out_what_the_forward_pass_does(case, bound, adversarial, device, emulated_triton):
    emulated_triton.settings.device = device
    emulate(emulated_triton, case)
    whole.check_bounded(bounded(case, bound, CPU, adversarial), bound, adversarial, "triton")


@pytest.mark.parametrize("causal", [True, False])
def test_tiles_beyond_the_window_are_not_read(causal, gpu):
    """A NaN there changes no gradient: neither far keys that a query would read, nor far queries of a key."""
    case = small(seqlen_q=700, seqlen_k=700, num_heads=1, alibi="all", causal=causal)  # slope 2**-0.5
    inputs = bounded(case, 1.0, CPU)
    window = math.ceil((2 * inputs.options["logit_bound"].item() + 24 * math.log(2)) * 2**0.5)
    out, lse = exact_forward(inputs)
    expected = backward(inputs, out, lse)
    far = slice(0, 128)  # rows that no tile of the others reaches
    others = slice(128 + window + 2 * 128, None)
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.dout, out, lse.transpose(1, 2)):
        tensor[:, far] = math.nan
    for result, clean in zip(backward(inputs, out, lse), expected, strict=True):
        assert torch.equal(result[:, others], clean[:, others])
        assert result[:, far].isnan().any()


# ---- data that a row does not see -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", whole.TENSORS)
@pytest.mark.parametrize("case, device", in_turn(*(HIDDEN[i] for i in (0, 2, 3, 4, 2, 5))))
def test_hidden_numbers_stay_hidden(case, device, name, emulated_triton):
    emulated_triton.settings.device = device
    dtype = FLOAT16 if case.mask == "none" else BFLOAT16
    case = dataclasses.replace(case, head_dim=64, dtype=dtype, alibi="some")
    inputs = make(case, CPU)
    seqlen = getattr(inputs, name).shape[1]
    for index, row in enumerate(sorted({0, seqlen // 2, seqlen - 1})):
        channel = slice(None) if index == 1 else (37 * index + 5) % case.head_dim
        spoilt = whole.change(inputs, **{name: getattr(inputs, name).clone()})
        whole.check_hidden(spoilt, "triton", name, 0, row, 0, channel, whole.NOT_FINITE[(index + case.seqlen_q) % 3])


@pytest.mark.parametrize("name", ["k", "dout"])
def test_hidden_numbers_stay_hidden_in_float32(name, gpu):
    case = small(seqlen_q=40, seqlen_k=50, dtype=FLOAT32, mask="documents")
    whole.check_hidden(make(case, CPU), "triton", name, 0, 30, 0, 7, math.nan)


@pytest.mark.parametrize("name", whole.TENSORS)
def test_one_infinite_row_leaves_the_others_their_digits(name, emulated_triton):
    """Gradients in float16 are scaled, and an infinity must not influence the scale of other rows."""
    case = small(seqlen_q=96, seqlen_k=96, num_heads=1, dtype=FLOAT16, mask="documents", seed=3)
    whole.check_hidden(make(case, CPU), "triton", name, 0, 95, 0, 7, math.inf)


def test_every_number_hidden_from_a_document_at_once(emulated_triton):
    whole.test_every_number_hidden_from_a_document_at_once("triton", CPU)


@pytest.mark.parametrize("gradient", [2.0**-20, 2.0**-8, 2.0**12], ids=str)
def test_float16_gradients_of_any_size(gradient, emulated_triton):
    """Small ones are not lost, large ones do not overflow: dS and weights are rounded to float16."""
    inputs = make(small(seqlen_q=100, seqlen_k=100, dtype=FLOAT16), CPU)
    inputs.dout *= gradient
    inputs.dout[:, 50:] /= 64  # later rows lower the scale of a key
    values = "normal" if gradient > 2**-12 else "subnormal"
    check(inputs, "triton", values=values)


# ---- the result does not depend on how the work is divided ----------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [small(seqlen_q=200, seqlen_k=200), small(seqlen_q=50, seqlen_k=70, dtype=FLOAT32, mask="documents")],
    ids=str,
)
def test_schedules_change_no_bit(case, gpu):
    inputs = make(case, CPU)
    results = []
    for schedule, seed in (("fifo", 0), ("fifo", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        gpu.settings.schedule, gpu.settings.seed = schedule, seed
        results.append(whole.run(inputs, "triton"))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("multiprocessors, num_shares", [(1, 1), (10, 2), (15, 3), (100, 6)])
def test_shares_of_the_query_heads(multiprocessors, num_shares, emulated_triton, monkeypatch):
    """dk and dv are those of one share to rounding, whatever the device."""
    from andromeda.triton_kernels import launch, tiles

    monkeypatch.setattr(launch, "multiprocessors", lambda: multiprocessors)
    case = small(batch=2, seqlen_q=130, seqlen_k=130, num_heads=12, num_kv_heads=2, mask="documents")
    check(make(case, CPU), "triton")
    names = KERNELS[: 3 if num_shares > 1 else 2]
    assert [launch.kernel for launch in emulated_triton.launches] == names
    key_tiles = math.ceil(130 / tiles.choose(tiles.ATTENTION_BACKWARD_DK_DV, "sm_80", 2, 64).keys)
    assert emulated_triton.launches[1].grid[0] == num_shares * 2 * 2 * key_tiles


def test_number_of_shares():
    from andromeda.triton_kernels.attention_backward import num_shares_of

    wanted = 132 * 4
    for num_programs, group, expected in ((64, 24, 12), (1, 24, 24), (wanted, 24, 1), (wanted - 1, 24, 2), (9, 1, 1)):
        assert num_shares_of(num_programs, group, 132) == expected


# ---- laws -----------------------------------------------------------------------------------------------------------

EMPTY = [case for case in whole.EMPTY if case.causal]


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_p18_empty_inputs(case, emulated_triton, monkeypatch):
    monkeypatch.setattr(whole, "run", RUN_BOTH)
    whole.test_p18_empty_inputs(dataclasses.replace(case, dtype=BFLOAT16), "triton", CPU)


def test_slope_zero_is_no_bias(gpu):
    inputs = make(small(seqlen_q=70, seqlen_k=70, alibi="none"), CPU)
    whole.test_p8_slope_zero_is_no_bias.law[0](small(), inputs, "triton")


def test_packed_documents_are_separate_documents(emulated_triton):
    case = small(seqlen_q=100, seqlen_k=100, dtype=FLOAT32, seed=40)
    whole.test_p13_packed_documents_are_separate_documents.law[0](case, make(case, CPU), "triton")


def test_one_key_head_is_that_head_repeated(emulated_triton):
    case = small(seqlen_q=50, seqlen_k=70, dtype=FLOAT32)
    whole.test_p11_one_key_head_is_that_head_repeated.law[0](case, make(case, CPU), "triton")


def test_a_row_depends_on_its_head_and_entry_alone(gpu):
    case = small(batch=3, seqlen_q=70, seqlen_k=90, num_heads=4, num_kv_heads=2, mask="documents")
    for name in (
        "test_p1_permuting_batch_entries_and_heads_permutes_the_result",
        "test_p1_a_batch_entry_does_not_depend_on_its_neighbours",
    ):
        getattr(whole, name).law[0](case, make(case, CPU), "triton")


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis, device", [(0, "A100"), (1, "H200"), (2, "A100")])
def test_offsets_beyond_32_bits(axis, device, emulated_triton, monkeypatch):
    """Two indices of an axis are 3 * 2^30 elements apart: an offset of 32 bits is outside every buffer."""
    emulated_triton.settings.device = device
    near, far = emulated_triton.tensor, 3 * 2**30
    strides = [128, 256]
    strides.insert(axis, far)
    generator = torch.Generator().manual_seed(0)
    inputs = Inputs(*(torch.randn(2, 2, 2, 64, generator=generator).bfloat16() for _ in range(4)), {"causal": True})
    inputs.options["alibi_slopes"] = torch.tensor([0.5, 0.0])
    expected = run(inputs, "triton")

    def place(tensor, *, name, **options):
        """Memory is taken only where it is accessed."""
        if tensor.numel() == 0 or max(tensor.stride()) < far:
            return near(tensor, name=name, **options)
        place = emulated_triton.sparse(tensor.shape, tensor.dtype, name=name, strides=tensor.stride())
        place.memory.copy_(tensor)
        return place

    monkeypatch.setattr(emulated_triton, "tensor", place)
    memory = torch.empty(far + 8192, dtype=BFLOAT16)
    for index, name in enumerate(whole.TENSORS):
        tensor = memory[1024 * index :].as_strided((2, 2, 2, 64), (*strides, 1))
        setattr(inputs, name, tensor.copy_(getattr(inputs, name)))
    assert all(map(torch.equal, run(inputs, "triton"), expected))


def test_both_passes(gpu, monkeypatch):
    """The backward kernels take what the forward kernel gives."""
    monkeypatch.setattr(whole, "run", RUN_BOTH)
    monkeypatch.setattr(op, "NUM_SPLITS", -1)
    case = small(batch=2, seqlen_q=90, seqlen_k=130, num_heads=4, num_kv_heads=2, mask="documents")
    check(make(case, CPU), "triton")


def test_a_length_does_not_compile_again(gpu):
    """Only what changes the code may: a new length of a batch must not."""
    from andromeda.triton_kernels import attention_backward as kernels

    def variants():
        return sum(len(cache[0]) for name in KERNELS for cache in getattr(kernels, name).device_caches.values())

    counts = set()
    for seqlen_q, seqlen_k in ((33, 64), (33, 65), (64, 1), (1, 16), (48, 48)):
        whole.run(make(small(seqlen_q=seqlen_q, seqlen_k=seqlen_k), CPU), "triton")
        counts.add(variants())
    assert len(counts) == 1
