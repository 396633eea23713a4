"""Choice of a backend, a missing extension, and the data of `andromeda info`."""

import os
import subprocess
import sys
import types

import op_cases
import pytest
import torch

from andromeda.ops import _select


def reasons_of(table):
    return lambda backend: table[backend]


ALL_FAIL = {name: [f"no {name}"] for name in _select.BACKENDS}


def test_the_first_backend_without_a_reason_is_chosen():
    table = {**ALL_FAIL, "cpu": [], "reference": []}
    assert _select.choose("attention", _select.AUTO, reasons_of(table)) == "cpu"


def test_a_named_backend_is_not_replaced():
    table = {**ALL_FAIL, "cpu": [], "reference": []}
    assert _select.choose("attention", "reference", reasons_of(table)) == "reference"
    with pytest.raises(NotImplementedError) as error:
        _select.choose("attention", "cuda", reasons_of({**table, "cuda": ["too old", "too small"]}))
    assert str(error.value) == (
        "attention: backend 'cuda' does not support this call (these do: cpu, reference)\n    cuda: too old; too small"
    )


def test_when_none_can_run_each_says_why():
    with pytest.raises(NotImplementedError) as error:
        _select.choose("attention", _select.AUTO, reasons_of(ALL_FAIL))
    assert str(error.value) == (
        "attention: no backend supports this call\n"
        "    cuda:      no cuda\n"
        "    triton:    no triton\n"
        "    cpu:       no cpu\n"
        "    reference: no reference"
    )


def test_backend_argument():
    assert _select.backend_argument("attention", None) == _select.AUTO
    assert _select.backend_argument("attention", "cpu") == "cpu"
    for wrong in ("auto", "CPU", ""):
        with pytest.raises(ValueError, match="attention: backend must be None or one of 'cuda', 'triton', 'cpu'"):
            _select.backend_argument("attention", wrong)


@pytest.mark.parametrize(
    "built_for, capability, runs",
    [
        (["80-real"], (8, 0), True),
        (["80-real"], (8, 9), True),
        (["80-real"], (9, 0), False),
        (["80"], (12, 0), True),
        (["86-real"], (8, 0), False),
        (["90a-real"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["80-real", "90a-real"], (9, 0), True),
        (["80-virtual"], (7, 5), False),
        (["100-real"], (10, 0), True),
    ],
)
def test_architectures(built_for, capability, runs, monkeypatch):
    pretend(monkeypatch, built_for, capability)
    name = ".".join(map(str, capability))
    expected = [] if runs else [f"compute capability {name} (built for {', '.join(built_for)})"]
    assert _select.cuda_unavailable(torch.device("cuda", 0)) == expected


def pretend(monkeypatch, built_for=("80",), capability=(8, 0), **status):
    """An extension with these answers; a list of the devices that it is asked about."""
    asked = []
    answer = {"device_error": None, "kernel_error": None, "lasting": True} | status
    extension = types.SimpleNamespace(
        build_info=lambda: {"cuda_architectures": list(built_for)},
        cuda_versions=lambda: {"runtime": "13.0", "driver": "12.4"},
        cuda_status=lambda index: asked.append(index) or answer,
    )
    monkeypatch.setattr(_select, "extension", extension)
    monkeypatch.setattr(_select, "extension_error", None)
    monkeypatch.setattr(_select, "lasting_answers", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return asked


def test_cuda_without_an_extension_or_kernels(monkeypatch):
    monkeypatch.setattr(_select, "lasting_answers", {})
    monkeypatch.setattr(_select, "extension", None)
    monkeypatch.setattr(_select, "extension_error", "not built")
    assert _select.cuda_unavailable(torch.device("cuda", 0)) == ["not built"]
    assert pretend(monkeypatch, built_for=()) == []
    assert _select.cuda_unavailable(torch.device("cuda", 0)) == ["the extension was built without CUDA"]


def test_an_error_of_the_device_comes_with_both_versions(monkeypatch):
    pretend(monkeypatch, device_error="cudaErrorInsufficientDriver, too old", capability=(7, 5))
    assert _select.cuda_unavailable(torch.device("cuda", 0)) == [
        "cudaErrorInsufficientDriver, too old (built with CUDA 13.0, the driver runs 12.4)"
    ]


def test_an_error_of_the_kernels_is_told_by_the_capability_first(monkeypatch):
    device = torch.device("cuda", 0)
    pretend(monkeypatch, capability=(7, 5), kernel_error="cudaErrorNoKernelImageForDevice, none")
    assert _select.cuda_unavailable(device) == ["compute capability 7.5 (built for 80)"]
    pretend(monkeypatch, kernel_error="cudaErrorUnsupportedPtxVersion, too new")
    assert _select.cuda_unavailable(device) == [
        "cudaErrorUnsupportedPtxVersion, too new (built with CUDA 13.0, the driver runs 12.4)"
    ]


@pytest.mark.parametrize("lasting", [True, False])
def test_only_an_answer_that_lasts_is_kept(monkeypatch, lasting):
    asked = pretend(monkeypatch, device_error="cudaErrorX, y", lasting=lasting)
    for _ in range(3):
        assert "cudaErrorX" in _select.cuda_unavailable(torch.device("cuda", 0))[0]
    assert asked == ([0] if lasting else [0, 0, 0])


def test_answers_are_kept_per_device(monkeypatch):
    asked = pretend(monkeypatch)
    for index in (0, 1, 0, 1):
        assert _select.cuda_unavailable(torch.device("cuda", index)) == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _select.cuda_unavailable(torch.device("cuda")) == []
    assert _select.cuda_unavailable(torch.device("cpu")) == []
    assert asked == [0, 1, 3]


def test_a_forked_child_asks_again(monkeypatch):
    """CUDA does not work in the child of a process that has used it, whatever the answer in the parent was."""
    device = torch.device("cuda", 7)
    _select.lasting_answers[device] = ["of the parent"]
    monkeypatch.setitem(_select.plans, "of the parent", ("cuda",))
    try:
        child = os.fork()
        if child == 0:
            os._exit(len(_select.lasting_answers) + len(_select.plans))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert _select.lasting_answers[device] == ["of the parent"]
    finally:
        _select.lasting_answers.clear()


def test_report_lists_every_backend_of_every_operation():
    report = _select.report()
    assert set(report) == {"attention", "qk_norm_rotary", "token_shift_norm"}
    for reasons in report.values():
        assert tuple(reasons) == _select.BACKENDS
        assert reasons["reference"] == []
        assert all(isinstance(reason, str) and reason for name in reasons for reason in reasons[name])


def test_report_is_of_the_dtype_asked_for():
    report = _select.report("cpu", torch.float64)
    for reasons in report.values():
        assert any("float64" in reason for reason in reasons["cpu"]) or _select.extension is None
        assert reasons["reference"] == []


def test_needs_function():
    plain, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    assert _select.needs_function("op", None, plain, leaf)
    assert not _select.needs_function("op", None, plain)
    with torch.no_grad():
        assert not _select.needs_function("op", leaf)
        with torch.autograd.forward_ad.dual_level():
            assert _select.needs_function("op", None)


# ---- the fixture `backend` of conftest.py


@pytest.fixture
def reports(monkeypatch):
    """Sets what `report` says: (device, dtype) -> reasons of each backend, the same for every operation."""
    op_cases.without_use.cache_clear()
    yield lambda table: monkeypatch.setattr(
        _select, "report", lambda device, dtype: {"attention": {**ALL_FAIL, **table(device, dtype)}}
    )
    op_cases.without_use.cache_clear()


@pytest.mark.parametrize("operation", ["attention", "qk_norm_rotary", "token_shift_norm"])
def test_on_the_cpu_no_test_loses_its_backends(operation, monkeypatch):
    left_out = set(op_cases.without_use(operation, "cpu"))
    assert not left_out & {"cpu", "reference"}
    monkeypatch.setattr(_select, "extension", None)
    monkeypatch.setattr(_select, "extension_error", "not built")
    assert set(op_cases.without_use.__wrapped__(operation, "cpu")) == {"cuda", "triton"}


def test_a_backend_with_no_use_is_left_out_with_its_reasons(reports):
    reports(lambda device, dtype: {"cpu": [], "reference": []})
    assert op_cases.without_use("attention", "cpu") == {"cuda": ["no cuda"], "triton": ["no triton"]}
    reports(lambda device, dtype: {"cuda": [], "reference": []})
    assert op_cases.without_use("attention", "cuda:1") == {"triton": ["no triton"], "cpu": ["no cpu"]}


def test_one_dtype_that_runs_is_use_enough(reports):
    reports(lambda device, dtype: {"reference": [], **({"cuda": []} if dtype == torch.bfloat16 else {})})
    assert "cuda" not in op_cases.without_use("attention", "cuda")


IMPORT_WITH = """
import importlib, sys
real = importlib.import_module
def import_module(name, package=None):
    if name == "andromeda._C":
        raise {error}
    return real(name, package)
importlib.import_module = import_module
import torch
from andromeda.ops import _select
from andromeda.ops.attention import attention, unsupported
q = torch.ones(1, 2, 1, 4)
assert _select.extension is None
assert attention(q, q, q).shape == q.shape
print(unsupported("cpu", q, q, q)[0])
"""


def run_import_with(error):
    return subprocess.run(
        [sys.executable, "-c", IMPORT_WITH.format(error=error)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "error, reason",
    [
        ("ModuleNotFoundError('No module', name='andromeda._C')", "the extension andromeda._C is not built"),
        ("ImportError('libfoo.so: wrong ELF class')", "cannot be loaded: libfoo.so: wrong ELF class"),
    ],
    ids=["missing", "broken"],
)
def test_without_a_working_extension_everything_imports_and_the_reference_runs(error, reason):
    result = run_import_with(error)
    assert result.returncode == 0, result.stderr
    assert reason in result.stdout


def test_a_wrong_instruction_set_is_an_error_not_a_fallback():
    result = run_import_with("ImportError('ANDROMEDA_CPU_ISA must be one of baseline, avx2, got sse')")
    assert result.returncode == 1
    assert "RuntimeError: ANDROMEDA_CPU_ISA must be one of baseline, avx2, got sse" in result.stderr
