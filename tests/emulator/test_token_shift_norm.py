"""token_shift_norm on CUDA, end to end through its own tests; rows of every length, runs, grids, long rows."""

import dataclasses
import math

import pytest
import test_token_shift_norm as operation
import torch
from numerics import nan_filled

from andromeda import Andromeda
from andromeda.ops import _select
from andromeda.ops import token_shift_norm as op
from andromeda.ops.token_shift_norm import token_shift_norm
from emulator import DEVICES, EmulatedExtension
from emulator.test_host import DTYPES, law_name

CPU = torch.device("cpu")
Case = operation.Case


def tensors_for(case, dtype=torch.float32, seed=0):
    return case.tensors(dtype, seed=seed)


def sliced_tensors_for(case, dtype=torch.float32, seed=0):
    """x and the residual as slices of larger tensors of NaN, at an odd offset: their rows are not aligned."""
    tensors = list(case.tensors(dtype, seed=seed))
    for index in range(2):
        if tensors[index] is not None:
            batch, seqlen, dim = tensors[index].shape
            surrounding = torch.full((batch, seqlen + 3, dim + 13), math.nan, dtype=dtype)
            tensors[index] = surrounding[:, 2:-1, 5:-8].copy_(tensors[index])
    return tensors


def judge(case, dtype, tensors_for=tensors_for):
    with nan_filled():
        operation.test_forward("cuda", tensors_for, CPU, case, dtype)
        operation.test_backward("cuda", tensors_for, CPU, case, dtype)


def accesses(emulated):
    """The variants that were launched: "chunk", "element"."""
    names = {"(andromeda::cuda::Access)0>": "chunk", "(andromeda::cuda::Access)1>": "element"}
    return {name for launch in emulated.launches for key, name in names.items() if key in launch.kernel}


@pytest.mark.parametrize("dtype", DTYPES, ids=operation.name_of)
@pytest.mark.parametrize("case", operation.CASES, ids=operation.name_of)
def test_cases(emulated, case, dtype):
    judge(case, dtype)
    assert {launch.kernel.partition("<")[0].rpartition("::")[2] for launch in emulated.launches} == {
        "token_shift_norm_forward_kernel",
        "token_shift_norm_backward_kernel",
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=operation.name_of)
@pytest.mark.parametrize("name", ["deepnorm", "history_of_three", "documents_and_history", "dim_16"])
def test_strided(emulated, name, dtype):
    case = next(case for case in operation.CASES if case.name == name)
    judge(case, dtype, sliced_tensors_for)
    assert accesses(emulated) == {"element"}


# Some lanes of a warp, a whole warp, several with whole and with ragged ends, all of a block; then tiles, the last one
# whole or ragged; segments that end inside a chunk.
WIDTHS = {
    torch.bfloat16: (8, 72, 512, 520, 1024, 2560, 8192, 8200, 24576),
    torch.float16: (264, 16384),
    torch.float32: (4, 260, 1028, 2560, 5120, 5124, 15360),
}


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "dim"), [(dtype, dim) for dtype, dims in WIDTHS.items() for dim in dims], ids=operation.name_of
)
def test_widths(emulated, dtype, dim, shift):
    judge(Case("", batch=1, seqlen=5, dim=dim, shift=shift, documents=True, history=True, position=3), dtype)
    assert accesses(emulated) == {"chunk"}


@pytest.mark.parametrize("dim", [257, 2561, 5121, 11001])
def test_odd_widths(emulated, dim):
    judge(Case("", seqlen=7, dim=dim, shift=2, documents=True), torch.bfloat16)
    assert accesses(emulated) == {"element"}


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("residual", ["scaled", "unscaled", "none"])
def test_long_rows(emulated, norm, residual):
    """Any part may be absent from rows of several tiles; a run holds several such rows."""
    options = {"norm": norm, "residual": residual != "none", "scaled": residual == "scaled"}
    judge(Case("", batch=2, seqlen=3, dim=8200, **options), torch.bfloat16)


@pytest.mark.parametrize("dim", [64, 520, 8200])
def test_more_runs_than_tokens(emulated, monkeypatch, dim):
    """The last runs are empty and write zeros."""
    monkeypatch.setattr(op, "_MIN_TOKENS_PER_PARTIAL", 1)
    judge(Case("", batch=1, seqlen=5, dim=dim), torch.bfloat16)


def test_statistics_of_tiles_are_merged_about_their_means(emulated):
    """The parts of the row have very different means: a difference of large sums would be wrong."""
    x = torch.randn(1, 2, 20000, dtype=torch.float64)
    x[..., 8192:16384] += 1000
    x, gamma = x.float(), torch.rand(20000)
    y, _ = token_shift_norm(x, gamma=gamma, backend="cuda")
    exact = torch.layer_norm(x.double(), (20000,), 1 + gamma.double())
    assert (y.double() - exact).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "emulated", [{"schedule": "reverse"}, {"schedule": "random", "seed": 7}], indirect=True, ids=str
)
@pytest.mark.parametrize("dim", [40, 1024, 2560, 8200])
def test_in_another_order(emulated, dim):
    judge(Case("", seqlen=9, dim=dim, shift=2, documents=True), torch.bfloat16)


@pytest.mark.parametrize("name", DEVICES)
def test_on_every_device(emulated, name):
    emulated.settings.device = name
    judge(Case("", seqlen=5, dim=1032, shift=2), torch.bfloat16)


LAWS = [
    (operation.test_an_unchanged_tensor_is_not_copied,),
    (operation.test_norm_of_a_row_far_from_zero,),
    (operation.test_norm_of_equal_channels,),
    (operation.test_a_bad_number_stays_in_its_row, math.nan),
    (operation.test_a_bad_number_stays_in_its_row, math.inf),
    (operation.test_strided_gradients,),
    (operation.test_later_tokens_change_nothing_before,),
    (operation.test_batch_entries_are_independent,),
    (operation.test_func_grad,),
    (operation.test_second_derivatives_of_kernels_and_tangents_are_refused,),
    (operation.test_one_output_alone, 0),
    (operation.test_one_output_alone, 1),
    (operation.test_only_requested_tensors_get_a_gradient,),
    (operation.test_vectors_may_have_the_dtype_of_the_model,),
    (operation.test_small_gammas_survive_half_precision,),
]
LAWS_WITH_A_DEVICE = [
    *[(operation.test_strides_do_not_matter, dtype) for dtype in DTYPES],
    (operation.test_calls_on_pieces_equal_one_call, (9, 8), True),
    (operation.test_calls_on_pieces_equal_one_call, (1,) * 17, False),
    (operation.test_calls_on_pieces_equal_one_call, (1, 2, 13, 1), True),
    (operation.test_documents_are_separate,),
    *[
        (operation.test_hidden_rows_do_not_count, norm, value)
        for norm, value in ((True, math.nan), (True, math.inf), (False, math.nan), (False, -math.inf))
    ],
    (operation.test_opcheck, "deepnorm"),
    (operation.test_opcheck, "shift_only"),
    (operation.test_opcheck, "documents_and_history"),
]


@pytest.mark.parametrize(("law", "arguments"), [(law, rest) for law, *rest in LAWS], ids=law_name)
def test_laws(emulated, law, arguments):
    law("cuda", tensors_for, *arguments)


@pytest.mark.parametrize(("law", "arguments"), [(law, rest) for law, *rest in LAWS_WITH_A_DEVICE], ids=law_name)
def test_laws_of_calls(emulated, law, arguments):
    law("cuda", tensors_for, CPU, *arguments)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)], ids=str)
def test_of_nothing(emulated, shape):
    operation.test_empty("cuda", CPU, shape)
    # Without tokens the gradients of the vectors must still be written, as zeros.
    assert [launch.kernel.partition("<")[0].rpartition("::")[2] for launch in emulated.launches] == [
        "token_shift_norm_backward_kernel"
    ]


def test_one_long_token(emulated):
    """Decoding: the other segments come from the history."""
    judge(Case("", batch=3, seqlen=1, dim=2560, shift=1, history=True, position=77), torch.bfloat16)


def test_two_threads_share_an_emulator(emulated):
    emulated.settings.check = False
    operation.test_two_callers_at_once("cuda", tensors_for, CPU)


def test_stream_grid_and_calls(emulated, monkeypatch):
    monkeypatch.setattr(_select, "current_stream", lambda device: 0x1234)
    case = dataclasses.replace(operation.PLAIN, batch=3, dim=2560)
    tensors = case.tensors(torch.bfloat16)
    operation.gradients(
        lambda *leaves: operation.run(*leaves, backend="cuda", **case.options()), tensors, tensors[:1] * 2
    )
    forward, backward = emulated.launches
    assert forward.stream == backward.stream == 0x1234
    assert forward.block == backward.block == (160, 1, 1)
    assert forward.shared_bytes == 0 and backward.shared_bytes == 160 * 4 * 2 * 16  # two chunks of each operand a lane
    assert forward.grid == (51, 1, 1)  # a row each
    assert backward.grid == (4, 1, 1)  # a run of partial sums each
    assert emulated.calls == []


def test_a_block_walks_several_rows(emulated):
    """A block does so if a GPU holds fewer blocks than there are rows; here across the ends of short sequences."""
    emulated.settings.check = False
    case = Case("", batch=1400, seqlen=3, dim=2056, shift=2)
    operation.test_forward("cuda", tensors_for, CPU, case, torch.bfloat16)
    assert emulated.launches[0].grid == (2100, 1, 1)


@pytest.mark.parametrize("deepnorm", [True, False], ids=["deepnorm", "prenorm"])
def test_no_operation_of_the_model_falls_back(emulated, monkeypatch, deepnorm):
    """Training and cached decoding in half precision."""
    emulated.settings.check = False
    chosen = set()
    choose = _select.choose

    def watched(op, *rest):
        backend = choose(op, *rest)
        chosen.add((op, backend))
        return backend

    monkeypatch.setattr(_select, "choose", watched)
    model = Andromeda(
        num_tokens=23, max_seq_len=48, dim=24, depth=1, dim_head=8, heads=2, alibi_num_heads=1, deepnorm=deepnorm
    ).bfloat16()
    model(torch.arange(12).view(2, 6), return_loss=True).backward()
    model.generate(torch.arange(3), 2, temperature=0.0)
    without_kernels = {("feed_forward", "reference"), ("linear_cross_entropy", "reference")}
    assert chosen - without_kernels == {(op, "cuda") for op in ("attention", "qk_norm_rotary", "token_shift_norm")}


def test_results_between_rows_are_left_alone(emulated):
    """The outputs are strided, although the operation itself never makes such outputs."""
    x, storage = torch.randn(2, 5, 16), torch.full((2, 6, 19), 7.0)
    options = dict.fromkeys(("residual", "residual_scale", "gamma", "history", "key_start"))
    shifted = storage[:, :5, 1:17]
    EmulatedExtension(emulated).token_shift_norm_forward(
        x=x, y=None, shifted=shifted, alpha=1.0, shift=1, position=0, num_threads=1, stream=0, **options
    )
    assert torch.equal(shifted, operation.reference.token_shift(x, 1))
    assert (storage[:, 5] == 7).all() and (storage[..., 0] == 7).all() and (storage[..., 17:] == 7).all()


def test_rows_before_their_key_start(emulated):
    operation.test_rows_before_their_key_start("cuda", CPU)
