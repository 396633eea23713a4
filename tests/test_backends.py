"""The model on every backend in turn: golden data with one backend for all operations (docs/model.md#15)."""

import golden_cases
import pytest
import test_generation
import test_model
import torch

from andromeda.ops import _select

OPERATIONS = frozenset(_select.report("cpu"))
# Their products are torch's, and Triton has the rest: beside CUDA kernels they run the reference.
WITHOUT_CUDA = frozenset({"feed_forward", "linear_cross_entropy"})
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


class Forced:
    """Every operation runs on `backend`, as if each call had named it."""

    def __init__(self, backend, monkeypatch):
        self.backend, self.chosen = backend, {}
        choose = _select.choose

        def watched(op, *arguments):
            self.chosen[op] = choose(op, *arguments)
            return self.chosen[op]

        monkeypatch.setattr(_select, "backend_argument", lambda op, backend: self.of(op))
        monkeypatch.setattr(_select, "choose", watched)

    def of(self, operation):
        return "reference" if self.backend == "cuda" and operation in WITHOUT_CUDA else self.backend

    def assert_used(self, *operations):
        """The operations that ran are these, on their backend."""
        assert self.chosen == {operation: self.of(operation) for operation in operations}


@pytest.fixture
def forced(request, monkeypatch):
    """A `Forced` for the backend of the parameter; "triton H200" is emulated."""
    backend, _, device = request.param.partition(" ")
    if device:
        emulator = request.getfixturevalue("emulated" if backend == "cuda" else "emulated_triton")
        emulator.settings.device = device
        emulator.settings.check = False  # the tests of the operations look for races
    return Forced(backend, monkeypatch)


def on(*backends):
    return pytest.mark.parametrize("forced", backends, indirect=True)


SMALL = [name for name, folder in golden_cases.CASES.items() if folder == golden_cases.SMALL]
# On emulated devices: with and without DeepNorm, one and several key heads, a wide head.
FEW = ["all_defaults", "fixed_scale_mha", "shift_two_no_positions", "wide_six_heads"]


@pytest.mark.parametrize("name", SMALL)
@on("cpu", "reference")
def test_golden(forced, name):
    """Logits, loss and gradients."""
    test_model.test_golden(name, FLOAT32)
    assert set(forced.chosen.values()) == {forced.backend}


@pytest.mark.parametrize("name", FEW)
@on("triton A100")
def test_golden_in_triton(forced, name):
    test_model.test_golden(name, FLOAT32)
    forced.assert_used(*OPERATIONS)


@pytest.mark.parametrize("name", FEW[:2])
@on("cpu", "reference", "triton H200", "cuda A100")
def test_golden_bfloat16(forced, name):
    test_model.test_golden_bfloat16(name)
    forced.assert_used(*OPERATIONS)


@pytest.mark.parametrize("name", FEW)
@on("cpu", "reference", "triton A100")
def test_golden_decode(forced, name):
    """A prompt, then one token after the other with the cache."""
    test_generation.test_golden_decode(name, FLOAT32)
    assert set(forced.chosen.values()) == {forced.backend}


@pytest.mark.parametrize("name", FEW[:2])
@on("triton H200", "cuda A100")
def test_golden_decode_bfloat16(forced, name):
    test_generation.test_golden_decode(name, BFLOAT16)
    assert set(forced.chosen.values()) == {forced.backend}


@pytest.mark.parametrize("name", FEW[:1])
@on("cpu", "reference", "triton A100")
def test_golden_greedy(forced, name):
    """The tokens of `generate`."""
    test_generation.test_golden_greedy(name, FLOAT32, True)
    assert set(forced.chosen.values()) == {forced.backend}
