"""Hands CMakeLists.txt to CMake. Sources, flags and default architectures are there; the choices of a user are here.

ANDROMEDA_CUDA=auto|0|1   build the CUDA kernels: when an nvcc is found (default), never, or fail without one
TORCH_CUDA_ARCH_LIST      "8.0;9.0+PTX"; or CMAKE_CUDA_ARCHITECTURES, CUDAARCHS in CMake's spelling
MAX_JOBS                  compilers at a time
"""

import fcntl
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
GIB_PER_COMPILER = 2.5  # nvcc's peak for one template-heavy file


def find_nvcc(environ, toolkit="/usr/local/cuda"):
    """The CUDA compiler, or None when there is none or ANDROMEDA_CUDA=0."""
    choice = environ.get("ANDROMEDA_CUDA") or "auto"
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"andromeda: ANDROMEDA_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return None
    if named := environ.get("CUDACXX"):
        if found := shutil.which(named, path=environ.get("PATH")):
            return found
        raise SystemExit(f"andromeda: CUDACXX must name a CUDA compiler, got {named!r}")
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    folders = [os.path.join(home, "bin") for home in homes] + [environ.get("PATH", ""), os.path.join(toolkit, "bin")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None and choice == "1":
        raise SystemExit(
            "andromeda: ANDROMEDA_CUDA=1 asks for CUDA kernels, but no CUDA compiler (nvcc) was found\n"
            f"  looked in:   CUDACXX, CUDA_HOME, CUDA_PATH, PATH, {toolkit}\n"
            "  to find it:  CUDA_HOME=<folder that holds bin/nvcc> pip install -v .\n"
            "  to skip it:  ANDROMEDA_CUDA=0 pip install -v ."
        )
    return nvcc


def cuda_architectures(environ):
    """The architectures asked for, in CMake's spelling; "" leaves the choice to CMakeLists.txt."""
    if chosen := environ.get("CMAKE_CUDA_ARCHITECTURES"):
        return chosen
    if listed := environ.get("TORCH_CUDA_ARCH_LIST"):
        architectures = []
        for item in filter(None, re.split(r"[;,\s]+", listed)):
            if not (match := re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)):
                raise SystemExit(
                    f'andromeda: TORCH_CUDA_ARCH_LIST must list numbers such as "8.0;9.0a+PTX", got {item!r}'
                )
            major, minor, suffix, ptx = match.groups()
            architectures.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
        return ";".join(architectures)
    return environ.get("CUDAARCHS", "")


def job_count(environ, cores, memory_gib):
    """Compilers at a time: as asked for, else as many as cores and memory carry."""
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        if value := environ.get(name):
            if not value.isdecimal() or int(value) == 0:
                raise SystemExit(f"andromeda: {name} must be a positive integer, got {value!r}")
            return int(value)
    return max(1, min(cores, int(memory_gib / GIB_PER_COMPILER)))


def machine():
    """Cores this process may use and memory in GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def program(package, folder):
    """cmake or ninja: that of the installed build requirement, else that of the system."""
    try:
        return os.path.join(getattr(importlib.import_module(package), folder), package)
    except ImportError:
        return package


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        nvcc = find_nvcc(os.environ)
        jobs = job_count(os.environ, *machine())
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # kept: the next install is incremental
        cmake, ninja = program("cmake", "CMAKE_BIN_DIR"), program("ninja", "BIN_DIR")
        # The tools of an isolated build live in a folder of that one build: their paths must be given every time.
        configure = [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DANDROMEDA_VERSION={self.distribution.get_version()}"]
        configure += [f"-DANDROMEDA_CUDA={os.environ.get('ANDROMEDA_CUDA') or 'auto'}"]
        configure += [f"-DANDROMEDA_CUDA_ARCHITECTURES={cuda_architectures(os.environ)}"]
        configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []

        tree.mkdir(parents=True, exist_ok=True)
        with open(tree / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one tree would spoil ninja's records
            self.build(ext, tree, configure, nvcc, jobs)

    def build(self, ext, tree, configure, nvcc, jobs):
        # CMake looks for compilers and Python once. A tree made for others, or left by an interruption, starts anew.
        compilers = [os.environ.get(name, "") for name in ("CC", "CXX", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX")]
        made_for = "\n".join([str(ROOT), sys.version, sys.base_prefix, nvcc or "no nvcc", *compilers])
        stamp = tree / "made_for.txt"
        if not stamp.exists() or stamp.read_text() != made_for:
            configure.append("--fresh")
        stamp.unlink(missing_ok=True)
        self.call(configure, nvcc, jobs)
        stamp.write_text(made_for)
        self.call([configure[0], "--build", str(tree), "--parallel", str(jobs)], nvcc, jobs)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(tree / target.name), str(target))

    def call(self, command, nvcc, jobs):
        print("andromeda:", shlex.join(command), flush=True)
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                "andromeda: the build failed, the reason stands above\n"
                f"  compilers (CXX, CUDACXX):  {os.environ.get('CXX') or 'as CMake found it'}, {nvcc or 'no CUDA'}\n"
                "  to skip the CUDA kernels:  ANDROMEDA_CUDA=0 pip install -v .\n"
                f"  if memory ran out:         MAX_JOBS=1 pip install -v .   (this time it was {jobs})"
            )

    def copy_file(self, infile, outfile, **options):
        """Under a temporary name first: an interruption must not leave half a library."""
        super().copy_file(infile, f"{outfile}.part", **options)
        os.replace(f"{outfile}.part", outfile)
        return outfile, True


if __name__ == "__main__":
    setup(ext_modules=[Extension("andromeda._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
