"""One case of each Triton kernel, short enough to run with every version of Triton: .ci/run has the oldest and newest.

Other cases of the same tests run with one version, in the other files.
"""

import os

import pytest
import test_attention
import test_budget
import test_feed_forward
import test_linear_cross_entropy
import test_qk_norm_rotary
import test_token_shift_norm
import torch

triton = pytest.importorskip("triton")

CPU = torch.device("cpu")
HALF = torch.bfloat16
devices = pytest.mark.parametrize("emulated_triton", [{"device": "A100"}, {"device": "H200"}], indirect=True, ids=str)
# The limits of 3.6 are in the budget. Here a program must fit, whatever it spills: one for each kernel.
COMPILED = {name.split()[0]: name for name in reversed(test_budget.CALLS) if "bfloat16" in name and "odd" not in name}


def case_named(operation, name):
    return next(case for case in operation.CASES if case.name == name)


def tensors_for(case, dtype=torch.float32, seed=0):
    return case.tensors(dtype, seed=seed)


def test_the_version_is_the_one_asked_for():
    assert triton.__version__.startswith(os.environ.get("TRITON_VERSION", ""))


@devices
@pytest.mark.parametrize(
    "case",
    [
        test_attention.Case(seqlen_q=130, seqlen_k=150, head_dim=64, num_heads=4, dtype=HALF, mask="documents"),
        test_attention.Case(seqlen_q=40, seqlen_k=50, head_dim=20, dtype=torch.float32, layout="slice"),
        test_attention.Case(seqlen_q=3, seqlen_k=200, head_dim=64, dtype=HALF),
    ],
    ids=str,
)
def test_attend(emulated_triton, case):
    test_attention.test_matches_the_reference(case, "triton", CPU)


@devices
def test_split_keys(emulated_triton, monkeypatch):
    case = test_attention.Case(batch=1, seqlen_q=1, num_heads=5, head_dim=64, dtype=HALF)
    test_attention.check_splits(case, 3, CPU, monkeypatch, "triton")


@devices
def test_normalise_and_rotate(emulated_triton):
    case = case_named(test_qk_norm_rotary, "model")
    test_qk_norm_rotary.test_forward("triton", tensors_for, case, HALF)
    test_qk_norm_rotary.test_backward("triton", tensors_for, case, HALF)


@devices
def test_shift_and_normalise(emulated_triton):
    case = case_named(test_token_shift_norm, "deepnorm")
    test_token_shift_norm.test_forward("triton", tensors_for, CPU, case, HALF)
    test_token_shift_norm.test_backward("triton", tensors_for, CPU, case, HALF)


@devices
def test_loss(emulated_triton):
    case = case_named(test_linear_cross_entropy, "wide")
    test_linear_cross_entropy.test_loss_and_gradients("triton", tensors_for, case, HALF)


@devices
def test_feed(emulated_triton):
    case = case_named(test_feed_forward, "wide")
    test_feed_forward.test_forward("triton", tensors_for, case, HALF)
    test_feed_forward.test_backward("triton", tensors_for, case, HALF)


@pytest.mark.skipif("TRITON_VERSION" not in os.environ, reason="the budget compiles them, and more")
@pytest.mark.parametrize("architecture", ["sm_100", "sm_120", "gfx942"])  # the others run above
def test_compile(architecture):
    from andromeda.triton_kernels.launch import OLDEST_TRITON, SHARED_MEMORY

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < OLDEST_TRITON[architecture]:
        pytest.skip(f"Triton {triton.__version__} is too old for {architecture}")
    if version < (3, 5) and architecture == "gfx942":
        pytest.skip(f"Triton {triton.__version__} links AMD's code with a program of ROCm")
    usages = [usage for name in COMPILED.values() for usage in test_budget.measure(architecture, name)]
    assert [usage for usage in usages if usage.shared > SHARED_MEMORY[architecture]] == []
