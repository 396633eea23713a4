"""Runs CMake. CMakeLists.txt holds sources, flags and default architectures; this file reads the user's choices.

ANDROMEDA_CUDA=auto|0|1   build the CUDA kernels if an nvcc is found (default), never, or always (fail without one)
ANDROMEDA_PTXAS           the assembler of the CUDA kernels: a path, or "nvcc" for nvcc's own. Default: the newest of
                          nvcc's own, that of the wheel nvidia-cuda-nvcc, and that of an earlier build
ANDROMEDA_BUILD_TREE      folder for CMake's tree (default: build/cmake-<Python>)
TORCH_CUDA_ARCH_LIST      "8.0;9.0+PTX"; or CMAKE_CUDA_ARCHITECTURES, CUDAARCHS in CMake's spelling
MAX_JOBS                  compilers at a time

This file is also the build backend: that of setuptools, which also requires that wheel if nvcc's ptxas is old.
"""

import fcntl
import importlib.util
import operator
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, build_meta, setup
from setuptools.build_meta import (  # noqa: F401  # hooks of the build backend that are setuptools' own
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
GIB_PER_COMPILER = 2.5  # nvcc's peak for one template-heavy file

# From identical PTX for sm_90a, ptxas 12.8.93 and 13.0.88 made wrong shared-memory addresses, and 13.1.80 right ones:
# https://github.com/fla-org/flash-linear-attention/pull/1262
SOUND_PTXAS = (13, 1, 80)
# The tested one, as in constraints.txt: 47 MB to download (aarch64: 41), 125 MB with the wheels that it requires.
TESTED_PTXAS = (13, 5, 37)


def find_nvcc(environ, toolkit="/usr/local/cuda"):
    """The CUDA compiler; None if there is none or with ANDROMEDA_CUDA=0."""
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


def dotted(version):
    return ".".join(map(str, version))


PTXAS_WHEEL = f"nvidia-cuda-nvcc=={dotted(TESTED_PTXAS)}"


class Ptxas(NamedTuple):
    path: str
    version: tuple[int, int, int]

    def __str__(self):
        return dotted(self.version)


version_of = operator.attrgetter("version")


def read_ptxas(path):
    """The `Ptxas` at a path; None if no ptxas runs there."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", said)
    return Ptxas(str(path), tuple(map(int, found.groups()))) if found else None


def read_toolkit(nvcc, environ):
    """The folder of an nvcc, even if `nvcc` is a script that calls it, and its `Ptxas`; None, None if there is none."""
    facts = {}
    for host in filter(None, ("gcc", environ.get("CUDAHOSTCXX"), environ.get("CXX"), "c++", "clang++")):
        # nvcc prints nothing without a compiler for the host's half; any compiler works here.
        command = [nvcc, "--dryrun", "-ccbin", host, "-x", "cu", "-c", os.devnull]
        try:
            said = subprocess.run(command, capture_output=True, text=True).stderr
        except OSError:
            return None, None
        if facts := dict(re.findall(r"^#\$ (_HERE_|PATH)=(.*)$", said, re.MULTILINE)):
            break
    ptxas = read_ptxas(shutil.which("ptxas", path=facts.get("PATH", "")) or "")
    return (os.path.abspath(facts["_HERE_"]), ptxas) if ptxas and "_HERE_" in facts else (None, None)


def available_ptxas(tree):
    """The `Ptxas` of wheels in the build environment, and those that earlier builds have put into a CMake tree."""
    package = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in package.submodule_search_locations] if package else []
    paths = [path for place in places for path in place.glob("*/bin/ptxas")] + list(tree.glob("ptxas-*/bin/ptxas"))
    return list(filter(None, map(read_ptxas, paths)))


def choose_ptxas(environ, own, available):
    """The `Ptxas` that assembles the kernels: nvcc's own, or a newer one.

    Never an older one, which would not understand the PTX that nvcc writes. One of another major version only on
    request: drivers of nvcc's version do not load its code.
    """
    choice = environ.get("ANDROMEDA_PTXAS")
    if choice == "nvcc":
        return own
    if choice:
        chosen = read_ptxas(os.path.abspath(shutil.which(choice) or choice))
        if chosen is None:
            raise SystemExit(f"andromeda: ANDROMEDA_PTXAS must be nvcc or the path of a ptxas, got {choice!r}")
        if chosen.version < own.version:
            raise SystemExit(f"andromeda: ANDROMEDA_PTXAS must not be older than nvcc's own, {own}, got {chosen}")
        return chosen
    return max([own, *(ptxas for ptxas in available if ptxas.version[0] == own.version[0])], key=version_of)


def describe_ptxas(chosen, own):
    """A line that names the chosen ptxas and its known faults."""
    line = f"andromeda: ptxas {chosen} assembles the CUDA kernels"
    line += ": nvcc's own" if chosen.version == own.version else f" (nvcc's own is {own}): {chosen.path}"
    if chosen.version[0] != own.version[0]:
        line += f". Drivers that run CUDA {own.version[0]} only do not load its code"
    if chosen.version >= SOUND_PTXAS:
        return line
    remedy = f"pip install {PTXAS_WHEEL}" if own.version[0] == SOUND_PTXAS[0] else "a CUDA toolkit of version 13.1"
    return (
        f"{line}. 12.8.93 and 13.0.88 are known to give some code for sm_90a wrong shared-memory addresses, and "
        f"{dotted(SOUND_PTXAS)} is not. To get a newer one: {remedy}, or ANDROMEDA_PTXAS=<its path>"
    )


def nvcc_with(ptxas, nvcc_folder, tree):
    """The path of an nvcc in `tree` that runs another ptxas, a copy of which stays in the tree.

    nvcc finds its parts through nvcc.profile, and this file in the folder of the path by which nvcc was called. This
    nvcc is therefore a link, in a folder of links to all other parts, with a changed nvcc.profile. The ptxas is
    copied, because the wheel of an isolated build is gone afterwards, while tests and the next build compile in this
    tree.
    """
    folder = tree / f"ptxas-{ptxas}" / "bin"
    copy = folder / "ptxas"
    if Path(ptxas.path) != copy:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copy2(ptxas.path, folder / "ptxas.part")  # keeps its time: ccache and ninja see the same file
        os.replace(folder / "ptxas.part", copy)
    for part in Path(nvcc_folder).iterdir():
        if part.name not in ("ptxas", "nvcc.profile"):
            (folder / part.name).unlink(missing_ok=True)
            (folder / part.name).symlink_to(part)
    profile = Path(nvcc_folder, "nvcc.profile").read_text().replace("$(_HERE_)", nvcc_folder)
    (folder / "nvcc.profile").write_text(f"{profile}\nPATH += $(_HERE_):\n")  # += prepends
    return str(folder / "nvcc")


def cuda_compiler(environ, tree):
    """The nvcc of a CMake tree, which runs the chosen ptxas, and a line about that ptxas; or None, None."""
    nvcc = find_nvcc(environ)
    nvcc_folder, own = read_toolkit(nvcc, environ) if nvcc else (None, None)
    if own is None:
        return nvcc, None
    chosen = choose_ptxas(environ, own, available_ptxas(tree))
    line = describe_ptxas(chosen, own)
    return (nvcc if chosen.version == own.version else nvcc_with(chosen, nvcc_folder, tree)), line


def wheels_for_building(environ):
    """Requirements of an isolated build besides pyproject.toml's: the tested ptxas, if nvcc's own is faulty."""
    nvcc = find_nvcc(environ)
    if nvcc is None or environ.get("ANDROMEDA_PTXAS") or platform.machine() not in ("x86_64", "aarch64"):
        return []
    _, own = read_toolkit(nvcc, environ)
    if own is None or own.version >= SOUND_PTXAS or own.version[0] != TESTED_PTXAS[0]:
        return []
    kept = choose_ptxas(environ, own, available_ptxas(build_tree(environ)))
    return [] if kept.version >= TESTED_PTXAS else [PTXAS_WHEEL]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *wheels_for_building(os.environ)]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *wheels_for_building(os.environ)]


def cuda_architectures(environ):
    """The requested architectures, in CMake's spelling; "" leaves the choice to CMakeLists.txt."""
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
    """The number of compilers at a time: the requested one, else as many as cores and memory permit."""
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        if value := environ.get(name):
            if not value.isdecimal() or int(value) == 0:
                raise SystemExit(f"andromeda: {name} must be a positive integer, got {value!r}")
            return int(value)
    return max(1, min(cores, int(memory_gib / GIB_PER_COMPILER)))


def machine():
    """The cores that this process may use, and the memory in GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def program(package, folder):
    """The path of cmake or ninja: from the installed build requirement, else from the system."""
    try:
        return os.path.join(getattr(importlib.import_module(package), folder), package)
    except ImportError:
        return package


def build_tree(environ):
    """The folder of CMake's tree. It is kept, so the next build is incremental."""
    usual = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    return Path(environ.get("ANDROMEDA_BUILD_TREE") or usual).resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        jobs = job_count(os.environ, *machine())
        tree = build_tree(os.environ)
        cmake, ninja = program("cmake", "CMAKE_BIN_DIR"), program("ninja", "BIN_DIR")
        # The tools of an isolated build are in a temporary folder, so their paths must be given every time.
        configure = [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DANDROMEDA_VERSION={self.distribution.get_version()}"]
        configure += [f"-DANDROMEDA_CUDA={os.environ.get('ANDROMEDA_CUDA') or 'auto'}"]
        configure += [f"-DANDROMEDA_CUDA_ARCHITECTURES={cuda_architectures(os.environ)}"]

        tree.mkdir(parents=True, exist_ok=True)
        with open(tree / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one tree would corrupt ninja's records
            nvcc, about_ptxas = cuda_compiler(os.environ, tree)
            if about_ptxas:
                print(about_ptxas, flush=True)
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []
            self.build(ext, tree, configure, nvcc, jobs)

    def build(self, ext, tree, configure, nvcc, jobs):
        # CMake looks for compilers and Python once. A tree made for others, or left by an interruption, is made again.
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
                "andromeda: the build failed; the reason is above\n"
                f"  compilers (CXX, CUDACXX):  {os.environ.get('CXX') or 'as CMake found it'}, {nvcc or 'no CUDA'}\n"
                "  to skip the CUDA kernels:  ANDROMEDA_CUDA=0 pip install -v .\n"
                f"  if memory ran out:         MAX_JOBS=1 pip install -v .   (this time it was {jobs})"
            )

    def copy_file(self, infile, outfile, **options):
        """Copy under a temporary name first: an interruption must not leave a partial library."""
        super().copy_file(infile, f"{outfile}.part", **options)
        os.replace(f"{outfile}.part", outfile)
        return outfile, True


if __name__ == "__main__":
    setup(ext_modules=[Extension("andromeda._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
