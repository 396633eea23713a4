"""What was built, which instruction set runs, and how setup.py reads a user's wishes."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import andromeda
from andromeda import _C

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_py():
    """The functions of setup.py. Loading it under another name than __main__ builds nothing."""
    pytest.importorskip("setuptools")
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("andromeda_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_info():
    info = _C.build_info()
    assert info["version"] == andromeda.__version__ == metadata.version("andromeda-kernels")
    assert re.fullmatch(r"(GNU|Clang|AppleClang) \d+\.\d+.*", info["compiler"])
    assert info["build_type"] == "Release"
    assert "-O3" in info["flags"]
    assert info["cuda_requested"] in ("auto", "0", "1")
    assert set(_C.cpu_isas()) <= set(info["instruction_sets"])
    if info["cuda_compiler"] is None:
        assert info["cuda_architectures"] == []
        assert info["cuda_flags"] is None
    else:
        assert re.fullmatch(r"nvcc \d+\.\d+.*", info["cuda_compiler"])
        assert info["cuda_architectures"]
        assert all(re.fullmatch(r"\d+[af]?(-real|-virtual)?", name) for name in info["cuda_architectures"])


def test_build_info_names_no_paths():
    assert not re.search(r"(^|[\s=])/", " ".join(map(str, _C.build_info().values())))


def test_instruction_sets_are_in_order():
    order = ["baseline", "avx2", "avx512"]
    assert _C.cpu_isas() == order[: len(_C.cpu_isas())]
    assert _C.cpu_isa() in _C.cpu_isas()


def run_with_isa(isa, code):
    environ = {key: value for key, value in os.environ.items() if key != "ANDROMEDA_CPU_ISA"} | {"OMP_NUM_THREADS": "1"}
    if isa is not None:
        environ["ANDROMEDA_CPU_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_each_instruction_set_runs(isa):
    code = """
import torch, andromeda
from andromeda import _C
from andromeda.ops.token_shift_norm import token_shift_norm
q, k, v = torch.randn(3, 2, 70, 4, 24)
x, gamma = torch.randn(2, 70, 90), torch.randn(90)
outputs = [
    (
        *andromeda.qk_norm_rotary(q, k, rotary_dim=12, backend=name),
        andromeda.attention(q, k, v, backend=name),
        *token_shift_norm(x, gamma=gamma, residual=x, shift=3, backend=name),
    )
    for name in ("cpu", "reference")
]
for cpu, reference in zip(*outputs):
    torch.testing.assert_close(cpu, reference)
print(_C.cpu_isa())
"""
    result = run_with_isa(isa, code)
    assert result.stderr == ""
    assert result.stdout.strip() == isa


@pytest.mark.parametrize("isa", [None, ""], ids=["unset", "empty"])
def test_the_highest_instruction_set_is_the_default(isa):
    assert run_with_isa(isa, "from andromeda import _C; print(_C.cpu_isa())").stdout.strip() == _C.cpu_isas()[-1]


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2 "])
def test_an_unknown_instruction_set_fails_the_import(isa):
    result = run_with_isa(isa, "import andromeda")
    assert result.returncode == 1
    choices = ", ".join(_C.cpu_isas())
    assert f"ANDROMEDA_CPU_ISA must be one of {{{choices}}} on this machine, got '{isa}'" in result.stderr


def kernel_objects():
    """The object files that were compiled per instruction set; an installation from the source tree keeps them."""
    tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles"
    return sorted(tree.glob("cpu_*.dir/**/*.o"))


@pytest.mark.skipif(not kernel_objects() or not shutil.which("nm"), reason="no object files of a build here, or no nm")
def test_no_code_is_shared_between_instruction_sets():
    """The linker keeps one copy of a weak symbol. AVX-512 code under a common name would crash an older machine."""
    for path in kernel_objects():
        isa = re.search(r"cpu_(\w+)\.dir", str(path)).group(1)
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        weak = [line[19:] for line in listing.splitlines() if line[17] in "WVu"]
        # What compilers add for exceptions: a pointer, and Clang's call of std::terminate. Neither has vector code.
        own = (f"andromeda::cpu::{isa}::", "DW.ref.", "__clang_call_terminate")
        merged = [name for name in weak if not any(part in name for part in own)]
        assert not merged, f"{path.name} ({isa}) defines {merged}"


# ---- setup.py: pure functions of the environment ---------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path):
    """make("name") is a folder with bin/nvcc in it."""

    def make(name):
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        return nvcc.parent.parent

    return make


def test_nvcc_is_looked_up_in_order(setup_py, toolkit):
    cxx, home, path, on_path, standard = (toolkit(name) for name in ("cxx", "home", "path", "on_path", "standard"))
    environ = {"CUDACXX": f"{cxx}/bin/nvcc", "CUDA_HOME": f"{home}", "CUDA_PATH": f"{path}", "PATH": f"{on_path}/bin"}
    for name, expected in zip(("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"), (cxx, home, path, on_path), strict=True):
        for choice in ("auto", "1"):
            found = setup_py.find_nvcc(environ | {"ANDROMEDA_CUDA": choice}, standard)
            assert found == str(expected / "bin" / "nvcc")
        assert setup_py.find_nvcc(environ | {"ANDROMEDA_CUDA": "0"}, standard) is None
        del environ[name]
    assert setup_py.find_nvcc({}, standard) == str(standard / "bin" / "nvcc")


def test_no_nvcc(setup_py, tmp_path):
    assert setup_py.find_nvcc({"PATH": ""}, tmp_path) is None
    assert setup_py.find_nvcc({"PATH": "", "ANDROMEDA_CUDA": "0"}, tmp_path) is None
    with pytest.raises(SystemExit) as error:
        setup_py.find_nvcc({"PATH": "", "ANDROMEDA_CUDA": "1"}, tmp_path)
    message = str(error.value)
    assert len(message.splitlines()) == 4
    assert "no CUDA compiler (nvcc) was found" in message
    assert "ANDROMEDA_CUDA=0 pip install" in message
    with pytest.raises(SystemExit, match="CUDACXX must name a CUDA compiler, got '/nowhere/nvcc'"):
        setup_py.find_nvcc({"PATH": "", "CUDACXX": "/nowhere/nvcc"}, tmp_path)


@pytest.mark.parametrize("value", ["yes", "2", "AUTO", "off"])
def test_unknown_cuda_choice(setup_py, value):
    with pytest.raises(SystemExit, match=f"ANDROMEDA_CUDA must be auto, 0 or 1, got '{value}'"):
        setup_py.find_nvcc({"ANDROMEDA_CUDA": value})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ""),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}, "80-real;90"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0a, 12.0f;10.3+PTX"}, "80-real;90a-real;120f-real;103"),
        ({"CUDAARCHS": "86"}, "86"),
        ({"TORCH_CUDA_ARCH_LIST": "9.0", "CUDAARCHS": "86"}, "90-real"),
        ({"CMAKE_CUDA_ARCHITECTURES": "80;90a", "TORCH_CUDA_ARCH_LIST": "7.0"}, "80;90a"),
    ],
    ids=["default", "torch", "torch-suffixes", "cmake-environment", "torch-first", "cmake-first"],
)
def test_cuda_architectures(setup_py, environ, expected):
    assert setup_py.cuda_architectures(environ) == expected


@pytest.mark.parametrize("item", ["Hopper", "90", "9.0+ptx", "9.0b"])
def test_unreadable_cuda_architectures(setup_py, item):
    with pytest.raises(SystemExit, match=re.escape(f"got {item!r}")):
        setup_py.cuda_architectures({"TORCH_CUDA_ARCH_LIST": f"8.0;{item}"})


@pytest.mark.parametrize(
    ("environ", "cores", "memory_gib", "expected"),
    [
        ({}, 8, 64.0, 8),
        ({}, 64, 16.0, 6),
        ({}, 4, 1.0, 1),
        ({"MAX_JOBS": "3", "CMAKE_BUILD_PARALLEL_LEVEL": "7"}, 64, 512.0, 3),
        ({"CMAKE_BUILD_PARALLEL_LEVEL": "7"}, 2, 2.0, 7),
    ],
    ids=["cores", "memory", "little-memory", "max-jobs", "cmake"],
)
def test_job_count(setup_py, environ, cores, memory_gib, expected):
    assert setup_py.job_count(environ, cores, memory_gib) == expected


@pytest.mark.parametrize("value", ["0", "-1", "many", "2.5"])
def test_unreadable_job_count(setup_py, value):
    with pytest.raises(SystemExit, match=f"MAX_JOBS must be a positive integer, got '{value}'"):
        setup_py.job_count({"MAX_JOBS": value}, 2, 8.0)
