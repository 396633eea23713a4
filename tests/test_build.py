"""The built library, its instruction sets, and setup.py's handling of the user's choices."""

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
        assert info["ptxas"] is None
    else:
        assert re.fullmatch(r"\d+\.\d+\.\d+", info["ptxas"])
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
        # For exceptions, compilers add a pointer and Clang's call of std::terminate. Neither has vector code.
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


# ---- setup.py: the ptxas ---------------------------------------------------------------------------------------------


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def write_ptxas(path, version):
    return write_program(path, f"echo 'Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}'")


@pytest.fixture
def fake_toolkit(tmp_path):
    """make(version) is a toolkit in a path with spaces: an nvcc that prints the paths of its parts, a ptxas, others."""

    def make(version):
        folder = tmp_path / f"cuda {version}" / "bin"
        write_ptxas(folder / "ptxas", version)
        write_program(folder / "nvcc", f"echo '#$ _HERE_={folder}' >&2; echo '#$ PATH={folder}:/bin' >&2")
        write_program(folder / "cudafe++", "")
        (folder / "crt").mkdir()
        (folder / "nvcc.profile").write_text("TOP = $(_HERE_)/..\nPATH += $(TOP)/nvvm/bin:$(_HERE_):\n")
        return folder

    return make


def test_the_toolkit_behind_a_script(setup_py, fake_toolkit, tmp_path):
    folder = fake_toolkit("13.0.88")
    nvcc = write_program(tmp_path / "nvcc", f'exec "{folder}/nvcc" "$@"')
    assert setup_py.read_toolkit(nvcc, {}) == (str(folder), (str(folder / "ptxas"), (13, 0, 88)))


def test_an_nvcc_that_needs_a_host_compiler(setup_py, fake_toolkit, tmp_path):
    folder = fake_toolkit("13.0.88")
    nvcc = write_program(tmp_path / "nvcc", f'[ "$3" = /my/c++ ] || exit 1; exec "{folder}/nvcc" "$@"')
    assert setup_py.read_toolkit(nvcc, {"CXX": "g++"}) == (None, None)
    for name in ("CXX", "CUDAHOSTCXX"):
        assert setup_py.read_toolkit(nvcc, {name: "/my/c++"})[0] == str(folder)


def test_a_compiler_that_is_no_nvcc(setup_py, toolkit, tmp_path):
    for compiler in (write_program(tmp_path / "clang", "echo what? >&2; exit 1"), toolkit("empty") / "bin" / "nvcc"):
        assert setup_py.read_toolkit(compiler, {}) == (None, None)
        environ = {"CUDACXX": str(compiler), "PATH": ""}
        assert setup_py.cuda_compiler(environ, tmp_path) == (str(compiler), None)
        assert setup_py.wheels_for_building(environ) == []


@pytest.mark.parametrize(
    ("own", "available", "expected"),
    [
        ((13, 0, 88), [], (13, 0, 88)),
        ((13, 0, 88), [(13, 1, 80), (13, 5, 37), (13, 4, 92)], (13, 5, 37)),
        ((13, 0, 88), [(14, 0, 10), (12, 9, 86)], (13, 0, 88)),
        ((13, 6, 1), [(13, 5, 37)], (13, 6, 1)),
        ((12, 8, 93), [(13, 5, 37), (12, 9, 86)], (12, 9, 86)),
    ],
    ids=["alone", "newest", "other-major", "own-is-newer", "cuda-12"],
)
def test_which_ptxas(setup_py, own, available, expected):
    own, *available = (setup_py.Ptxas("somewhere", version) for version in (own, *available))
    for environ in ({}, {"ANDROMEDA_PTXAS": ""}):
        assert setup_py.choose_ptxas(environ, own, available).version == expected
    assert setup_py.choose_ptxas({"ANDROMEDA_PTXAS": "nvcc"}, own, available) is own


def test_a_named_ptxas(setup_py, tmp_path):
    own = setup_py.Ptxas("somewhere", (13, 0, 88))

    def choose(path):
        return setup_py.choose_ptxas({"ANDROMEDA_PTXAS": str(path)}, own, [setup_py.Ptxas("x", (13, 5, 37))])

    named = write_ptxas(tmp_path / "a b" / "ptxas", "14.1.2")
    assert choose(named) == (str(named), (14, 1, 2))
    with pytest.raises(SystemExit, match=r"must not be older than nvcc's own, 13\.0\.88, got 12\.9\.86"):
        choose(write_ptxas(tmp_path / "old", "12.9.86"))
    for wrong in (tmp_path / "nowhere", tmp_path, write_program(tmp_path / "other", "echo nothing")):
        with pytest.raises(SystemExit, match=f"ANDROMEDA_PTXAS must be nvcc or the path of a ptxas, got '{wrong}'"):
            choose(wrong)


def test_the_line_about_ptxas(setup_py):
    def line(chosen, own):
        return setup_py.describe_ptxas(setup_py.Ptxas("/w/ptxas", chosen), setup_py.Ptxas("/o/ptxas", own))

    assert line((13, 5, 37), (13, 0, 88)) == (
        "andromeda: ptxas 13.5.37 assembles the CUDA kernels (nvcc's own is 13.0.88): /w/ptxas"
    )
    assert line((13, 1, 80), (13, 1, 80)) == "andromeda: ptxas 13.1.80 assembles the CUDA kernels: nvcc's own"
    assert line((14, 1, 2), (13, 5, 37)).endswith("/w/ptxas. Drivers that run CUDA 13 only do not load its code")
    for own, remedy in (
        ((13, 0, 88), "pip install nvidia-cuda-nvcc=="),
        ((12, 8, 93), "a CUDA toolkit of version 13.1"),
    ):
        told = line(own, own)
        assert "12.8.93 and 13.0.88 are known" in told and remedy in told and "ANDROMEDA_PTXAS=" in told


def test_an_nvcc_with_another_ptxas(setup_py, fake_toolkit, tmp_path):
    folder, tree = fake_toolkit("13.0.88"), tmp_path / "a tree"
    wheel = write_ptxas(tmp_path / "wheel" / "bin" / "ptxas", "13.5.37")
    environ = {"CUDACXX": str(folder / "nvcc"), "PATH": "", "ANDROMEDA_PTXAS": str(wheel)}
    nvcc, told = setup_py.cuda_compiler(environ, tree)
    made = tree / "ptxas-13.5.37" / "bin"
    assert nvcc == str(made / "nvcc") and "13.5.37" in told
    assert {path.name for path in made.iterdir()} == {path.name for path in folder.iterdir()}
    assert all((made / name).samefile(folder / name) for name in ("nvcc", "cudafe++", "crt"))
    assert (made / "nvcc.profile").read_text().split("\n") == [
        f"TOP = {folder}/..", f"PATH += $(TOP)/nvvm/bin:{folder}:", "", "PATH += $(_HERE_):", ""
    ]  # fmt: skip

    shutil.rmtree(tmp_path / "wheel")  # an isolated build is over
    del environ["ANDROMEDA_PTXAS"]
    assert setup_py.cuda_compiler(environ, tree)[0] == nvcc
    assert setup_py.read_ptxas(made / "ptxas").version == (13, 5, 37)
    environ["ANDROMEDA_PTXAS"] = "nvcc"
    assert setup_py.cuda_compiler(environ, tree)[0] == str(folder / "nvcc")


def test_when_an_isolated_build_asks_for_the_wheel(setup_py, fake_toolkit, tmp_path, monkeypatch):
    old, new, other = (fake_toolkit(version) / "nvcc" for version in ("13.0.88", "13.1.80", "12.8.93"))
    environ = {"PATH": "", "ANDROMEDA_BUILD_TREE": str(tmp_path / "tree")}

    def asked_for(nvcc, **changes):
        return setup_py.wheels_for_building(environ | {"CUDACXX": str(nvcc)} | changes)

    monkeypatch.setattr(
        setup_py, "find_nvcc", lambda environ, find=setup_py.find_nvcc: find(environ, tmp_path / "none")
    )
    monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda name: None)  # no wheel is installed
    assert asked_for(old) == [setup_py.PTXAS_WHEEL]
    assert asked_for(new) == asked_for(other) == setup_py.wheels_for_building(environ) == []
    assert asked_for(old, ANDROMEDA_CUDA="0") == asked_for(old, ANDROMEDA_PTXAS="nvcc") == []
    write_ptxas(tmp_path / "tree" / "ptxas-13.5.37" / "bin" / "ptxas", "13.5.37")  # of an earlier build
    assert asked_for(old) == []
    monkeypatch.setattr(setup_py.platform, "machine", lambda: "ppc64le")
    assert asked_for(old, ANDROMEDA_BUILD_TREE=str(tmp_path)) == []


def test_the_tested_ptxas_is_pinned_and_strict(setup_py):
    assert setup_py.PTXAS_WHEEL in (ROOT / "constraints.txt").read_text().splitlines()
    strict = re.search(r"set\(strict_ptxas ([\d. ]+)\)", (ROOT / "CMakeLists.txt").read_text()).group(1).split()
    assert ".".join(map(str, setup_py.TESTED_PTXAS[:2])) in strict


def test_setup_py_is_a_whole_build_backend(setup_py):
    from setuptools import build_meta

    assert [
        name for name in build_meta.__all__ if name.islower() and name != "__legacy__" and not hasattr(setup_py, name)
    ] == []


# ---- setup.py: architectures and jobs --------------------------------------------------------------------------------


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
