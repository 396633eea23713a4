"""csrc/cpu/parallel.cpp: an exception of a task arrives at the caller, whichever thread ran the task."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
THREADS = {"threads": [], "OpenMP": list(map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))[:1]}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The compiled parallel.cpp."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no C++ compiler (CXX, c++)")
    target = tmp_path_factory.mktemp("parallel") / "parallel"
    sources = [TESTS / "parallel.cpp", TESTS.parent / "csrc/cpu/parallel.cpp"]
    command = [*compiler.split(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", *sources, "-ldl"]
    subprocess.run([*command, "-o", target], check=True)
    return target


@pytest.mark.parametrize("runtime", THREADS)
@pytest.mark.parametrize(
    "who, threads, said",
    [
        ("worker", 2, "thrown by worker"),
        ("worker", 5, "thrown by worker"),
        ("caller", 2, "thrown by caller"),
        ("caller", 1, "thrown by caller"),  # alone
        ("all", 5, "thrown by all"),
        ("nested", 3, "thrown by all"),
        ("nobody", 5, "nothing"),
    ],
)
def test_an_exception_of_a_task_arrives_at_the_caller(who, threads, said, runtime, program):
    """In this process, and in a forked child, which has no OpenMP workers; the next call works as usual."""
    if runtime == "OpenMP" and not THREADS[runtime]:
        pytest.skip("torch brings no libgomp here")
    command = [program, who, str(threads), *THREADS[runtime]]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.stdout == f"{said}, no memory, then 1000\n" * 2
    assert run.returncode == 0, run.stderr


def test_too_few_threads_share_the_work(program):
    """A limit on threads, or on memory for their stacks, costs only speed."""
    limit = "resource.setrlimit(resource.RLIMIT_AS, 2 * (2**25,))"
    script = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", script, program, "all", "64"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.stdout == "thrown by all, no memory, then 1000\n" * 2, run.stderr


NEAR_THE_LIMIT = """
import resource
import test_bindings, torch
from andromeda import _C

# One query and many keys: tasks for parts of the keys, and at last one that allocates a row of its own to add them up.
call = test_bindings.attention_call(1, 1, 800, 1, 1, 8192) | {"num_threads": 2}
results = call["out"], call["softmax_lse"]
_C.attention_forward(**call)  # starts the workers
expected = [result.clone() for result in results]


def fails(room):
    for result in results:
        result.fill_(float("nan"))
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, -1))
    try:
        _C.attention_forward(**call)
    except MemoryError:
        return True
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert all(map(torch.equal, results, expected)), f"wrong with room for {room} bytes"
    return False


low, high = 0, 2**28
assert fails(low) and not fails(high)
while high - low > 2**12:
    middle = (low + high) // 2
    low, high = (middle, high) if fails(middle) else (low, middle)
print(f"needs {high} bytes")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the size of this process from")
def test_a_task_without_memory_is_an_error_in_python():
    """With less and less address space, page by page: a `MemoryError`, or the right result."""
    # Every larger allocation gets its own pages and returns them.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "1"}
    environ = os.environ | allocator | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", NEAR_THE_LIMIT]
    run = subprocess.run(command, env=environ, cwd=TESTS, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.startswith("needs"), run.stderr
