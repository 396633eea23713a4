"""Choice of a backend, a missing extension, and the data of `andromeda info`."""

import ast
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import op_cases
import pytest
import torch

from andromeda.ops import _select
from andromeda.triton_kernels import launch


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
    _select.lasting_answers[device] = _select.triton_answers[device] = ["of the parent"]
    monkeypatch.setitem(_select.plans, "of the parent", ("cuda",))
    try:
        child = os.fork()
        if child == 0:
            os._exit(len(_select.lasting_answers) + len(_select.triton_answers) + len(_select.plans))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert _select.lasting_answers[device] == ["of the parent"]
    finally:
        _select.lasting_answers.clear()
        _select.triton_answers.clear()


def test_report_lists_every_backend_of_every_operation():
    report = _select.report()
    operations = {path.stem for path in Path(_select.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert set(report) == operations
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


# ---- Triton

GPU = torch.device("cuda", 0)


@pytest.fixture
def triton_of(monkeypatch):
    """triton_of(...): pretends that this Triton, with this GPU, is installed; returns the devices that were asked."""
    monkeypatch.setattr(_select, "triton_answers", {})

    def pretend(version="3.6.0", capability=(8, 0), failure=None):
        asked = []

        def current_target():
            asked.append(torch.cuda.current_device())
            if failure:
                raise failure

        active = types.SimpleNamespace(get_current_target=current_target)
        fake = types.SimpleNamespace(
            __version__=version, runtime=types.SimpleNamespace(driver=types.SimpleNamespace(active=active))
        )
        monkeypatch.setitem(sys.modules, "triton", fake)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        properties = types.SimpleNamespace(major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        launch._architecture_of_gpu.cache_clear()
        return asked

    yield pretend
    launch._architecture_of_gpu.cache_clear()


def test_triton_is_asked_once_for_each_gpu(triton_of):
    asked = triton_of()
    for _ in range(3):
        assert _select.triton_unavailable(GPU) == []
    assert asked == [0]


@pytest.mark.parametrize("version", ["3.3.1", "2.1.0", "3", "unknown"])
def test_an_old_triton(triton_of, version):
    asked = triton_of(version=version)
    assert _select.triton_unavailable(GPU) == [f"Triton {version} (on sm_80 these kernels need 3.4 or newer)"]
    assert asked == []  # the driver of an old Triton may be anything


@pytest.mark.parametrize("version, works", [("3.4.0", False), ("3.5.1", True)])
def test_a_triton_that_is_too_old_for_one_gpu(triton_of, version, works):
    triton_of(version=version, capability=(10, 0))
    reason = f"Triton {version} (on sm_100 these kernels need 3.5 or newer)"
    assert _select.triton_unavailable(GPU) == ([] if works else [reason])


@pytest.mark.parametrize("version", ["3.4.0", "3.5.1+git1234", "3.10.0", "4.0"])
def test_a_new_triton(triton_of, version):
    triton_of(version=version)
    assert _select.triton_unavailable(GPU) == []


def test_triton_without_a_driver(triton_of):
    triton_of(failure=RuntimeError("0 active drivers ([]). There should only be one.\nand more"))
    assert _select.triton_unavailable(GPU) == [
        "Triton 3.6.0 does not run on cuda:0: RuntimeError: 0 active drivers ([]). There should only be one."
    ]


def test_triton_on_an_unknown_gpu(triton_of):
    triton_of(capability=(7, 5))
    (reason,) = _select.triton_unavailable(GPU)
    assert reason.startswith("compute capability 7.5 (there are Triton kernels for sm_80, sm_86, sm_90, ")


def test_no_triton(triton_of, monkeypatch):
    triton_of()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for device in (GPU, torch.device("cpu")):
        assert _select.triton_unavailable(device) == ["Triton is not installed (`pip install triton`)"]


@pytest.mark.parametrize("error", [ImportError("no libtriton"), OSError("GLIBC_2.99"), AttributeError("x")])
def test_a_triton_that_cannot_be_imported(triton_of, monkeypatch, error):
    triton_of()

    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    assert _select.triton_unavailable(GPU) == [f"Triton cannot be imported: {type(error).__name__}: {error}"]


@pytest.mark.parametrize("installed", [True, False])
def test_a_call_on_the_cpu_does_not_need_triton(installed):
    """It does not import the kernels, nor Triton. (torch does, for its counter of operations.)"""
    code = f"""
import sys
if not {installed}:
    sys.modules["triton"] = None
import torch
from andromeda import attention
from andromeda.ops import _select
q = torch.randn(1, 4, 2, 8)
attention(q, q, q)
_select.report("cpu")
assert not [name for name in sys.modules if name.startswith("andromeda.triton_kernels")]
print(_select.common_reasons("triton", (torch.float32,), q=q))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reasons = ["tensors on cpu"] + ["Triton is not installed (`pip install triton`)"] * (not installed)
    assert ast.literal_eval(result.stdout) == reasons


# ---- order


def test_the_table_of_preferences_is_well_formed():
    operators = {
        f"{operation}_{direction}" for operation in _select.report("cpu") for direction in ("forward", "backward")
    }
    for (operator, architecture), found in _select.PREFERRED.items():
        assert operator in operators and architecture in launch.SHARED_MEMORY and found.backend in _select.BACKENDS
        assert any(character.isdigit() for character in found.reason), "a reason is a measurement"


def test_an_architecture_may_prefer_another_backend(triton_of, monkeypatch):
    triton_of(capability=(12, 0))
    entry = _select.Preference("triton", 100, "1.5 x as fast")
    monkeypatch.setattr(_select, "PREFERRED", {("attention_forward", "sm_120"): entry})
    assert _select.order("attention_forward", GPU, 100) == ("triton", "cuda", "cpu", "reference")
    assert _select.order("attention_forward", GPU, 99) == _select.BACKENDS
    assert _select.order("attention_backward", GPU, 100) == _select.BACKENDS
    assert _select.order("attention_forward", torch.device("cpu"), 100) == _select.BACKENDS
    able = {**ALL_FAIL, "cuda": [], "triton": [], "reference": []}
    call = GPU, "attention_forward", 100
    assert _select.choose("attention", _select.AUTO, reasons_of(able), *call) == "triton"
    assert _select.choose("attention", _select.AUTO, reasons_of({**able, "triton": ["no"]}), *call) == "cuda"
    assert _select.choose("attention", "cuda", reasons_of(able), *call) == "cuda"


@pytest.mark.parametrize("lasting", [True, False])
def test_a_triton_plan_is_kept_if_cuda_kernels_cannot_return(monkeypatch, lasting):
    pretend(monkeypatch, device_error="cudaErrorX, y", lasting=lasting)
    plan = types.SimpleNamespace(backend="triton")
    for _ in range(2):
        assert _select.plan("key", GPU, lambda: plan) is plan
    assert ("key" in _select.plans) == lasting
    _select.plan("other", GPU, lambda: types.SimpleNamespace(backend="reference"))
    assert "other" not in _select.plans


# ---- the fixture `backend` of conftest.py


@pytest.fixture
def reports(monkeypatch):
    """Sets what `report` says: (device, dtype) -> reasons of each backend, the same for every operation."""
    op_cases.without_use.cache_clear()
    yield lambda table: monkeypatch.setattr(
        _select, "report", lambda device, dtype: {"attention": {**ALL_FAIL, **table(device, dtype)}}
    )
    op_cases.without_use.cache_clear()


@pytest.mark.parametrize("operation", ["attention", "qk_norm_rotary", "token_shift_norm", "feed_forward"])
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
