"""Builds the extension on the emulator, the target `emulated` of CMakeLists.txt, and loads it."""

import contextlib
import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The tree that an installation from this folder leaves behind already has most objects. Without such a tree, or if it
# was made without CUDA, the emulator has its own.
INSTALLED_TREE = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
OWN_TREE = ROOT / "build" / f"emulated-{sys.implementation.cache_tag}"

announce = print  # reports that a build has begun; conftest.py sets a function that pytest does not capture


@functools.cache
def _setup_py():
    """The functions of setup.py, which find nvcc, cmake and ninja. Loaded under another name, it builds nothing."""
    spec = importlib.util.spec_from_file_location("andromeda_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def unavailable() -> str | None:
    """The reason why the emulated extension cannot be built here, or None."""
    missing = [name for name in ("setuptools", "pybind11") if importlib.util.find_spec(name) is None]
    if not missing:
        missing = [program for program in _tools() if shutil.which(program) is None]
    if missing:
        return f"emulator: not installed: {', '.join(missing)} (pip install 'andromeda-kernels[test]')"
    try:
        nvcc = _setup_py().find_nvcc(os.environ)
    except SystemExit as error:
        return f"emulator: {error}"
    if nvcc is None:
        return "emulator: no nvcc to compile the kernels with (CUDACXX, CUDA_HOME, PATH; ANDROMEDA_CUDA must not be 0)"
    return None


def _tools():
    program = _setup_py().program
    return program("cmake", "CMAKE_BIN_DIR"), program("ninja", "BIN_DIR")


@functools.cache
def load():
    """The emulated `_C` and the module `_emulator` in the same library, after a build of changed sources.

    Raises:
        RuntimeError: the build failed; with what the compiler said.
    """
    tree, failure = _build()
    if failure:
        raise RuntimeError(failure)
    library = tree / "emulated" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    modules = []
    for name in ("_C", "_emulator"):
        spec = importlib.util.spec_from_file_location(name, library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
    extension, host = modules
    host.set_ptx_files([str(path) for path in ptx_files()])
    return extension, host


def ptx_files():
    """The PTX of every kernel, after a build."""
    tree, _ = _build()
    return [Path(line) for line in (tree / "emulated" / "ptx_files.txt").read_text().splitlines()]


@functools.cache
def compile_ptx(architecture):
    """The PTX of the kernels in csrc/cuda for "80" or "90a", or of those in csrc/cuda/hopper alone: "hopper".

    Raises:
        RuntimeError: the build failed; with what the compiler said.
    """
    tree, failure = _build()
    if not failure:
        with _locked(tree):
            failure = _run([_tools()[0], "--build", str(tree), "--target", f"ptx_{architecture}"])
    if failure:
        raise RuntimeError(failure)
    paths = map(Path, (tree / f"ptx_{architecture}.txt").read_text().splitlines())
    return [path for path in paths if "csrc" in path.relative_to(tree).parts]


@functools.cache
def _build():
    """The tree, and the reason if the build failed; kept so that not every test tries again."""
    cmake, ninja = _tools()
    installed = _cache_of(INSTALLED_TREE)
    if (INSTALLED_TREE / "made_for.txt").exists() and installed.get("CMAKE_CUDA_COMPILER"):
        tree, cache = INSTALLED_TREE, installed
    else:
        tree, cache = OWN_TREE, _cache_of(OWN_TREE)
    jobs = _setup_py().job_count(os.environ, *_setup_py().machine())

    tree.mkdir(parents=True, exist_ok=True)
    with _locked(tree):
        options = _options(ninja, new=tree == OWN_TREE)
        commands = [[cmake, "--build", str(tree), "--target", "emulated", "--parallel", str(jobs)]]
        if not cache.items() >= options.items() or not os.path.exists(cache.get("CMAKE_COMMAND", "")):
            given = [f"-D{name}={value}" for name, value in options.items()]
            commands.insert(0, [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *given])
        for command in commands:
            if failure := _run(command):
                return tree, failure
    return tree, None


def _run(command):
    """Run a command of the build; returns its output if it failed. Announces that compilers are running."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, announced = [], False
    for line in process.stdout:
        lines.append(line)
        if "Building" in line and not announced:
            announce("emulator: building the extension and the PTX of its kernels")
            announced = True
    if process.wait() == 0:
        return None
    return f"emulator: {shlex.join(command)} failed:\n{''.join(lines)[-8000:]}"


def _options(ninja, *, new):
    """The options for CMake. In the tree of an isolated build, the paths of tools are stale and are set again; other
    options stay, so that the kernels are not recompiled. A new tree gets the options of an installation."""
    import pybind11

    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
    }
    if new:
        options["CMAKE_CUDA_COMPILER"], _ = _setup_py().cuda_compiler(os.environ, OWN_TREE)
        options["ANDROMEDA_CUDA_ARCHITECTURES"] = _setup_py().cuda_architectures(os.environ)
    return options


def _cache_of(tree):
    """The variables of a CMake tree; empty if it is not one."""
    path = tree / "CMakeCache.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = (line.partition("=") for line in lines if not line.startswith(("#", "//")))
    return {name.partition(":")[0]: value for name, separator, value in entries if separator}


@contextlib.contextmanager
def _locked(tree):
    with open(tree / "lock", "w") as lock:  # the lock of setup.py: two builds in one tree would corrupt ninja's records
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
