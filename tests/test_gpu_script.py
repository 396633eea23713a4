"""tests/gpu.sh without a GPU: a step succeeding, failing, hanging, crashing; the script killed, resumed, out of time.

A program replaces Python and answers the steps' commands according to the file `rules` next to it; the real
tests/gpu_report.py runs. While a call runs, gpu.json is read continuously: it must be valid JSON at every moment.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gpu_report
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "gpu.sh"
STEPS = ["build", "smoke", "triton", "quick", "profile", "tests", "wrappers", "sanitizer", "bench"]
pytestmark = pytest.mark.skipif(not shutil.which("timeout"), reason="needs coreutils")

# Replaces Python: the first rule whose pattern is in the command decides; without one the command succeeds. The output
# of a command, counts of tests or rows of a benchmark, is written by the rules that request it, and on success.
STUB = r"""#!/bin/bash
words=" $* "
case $words in
  *"gpu_report.py facts"*) cat "$STUB/facts.json"; exit ;;
  *"gpu_report.py libraries"*) [[ ! -e $STUB/two ]] || touch "$3/complete"; exit ;;
  *" tests/gpu_report.py "*) exec "$STUB_PYTHON" "$@" ;;
esac
printf '%s\n' "$*" >>"$STUB/calls"
target=${PART:-}
while (($#)); do
  [[ $1 != --json ]] || target=$2
  shift
done
write() { [[ -z $target ]] || { printf '%s' "$1" >"$target.part" && mv "$target.part" "$target"; }; }
if [[ -n ${PART:-} ]]; then
  good='{"passed": 3, "failed": 0, "skipped": 1, "failures": [], "finished": true, "ptxas": "13.1.80", "seconds": 1}'
else
  good=$(cat "$STUB/rows.json")
fi
while IFS=$'\t' read -r pattern action; do
  [[ $words == *"$pattern"* ]] || continue
  case $action in
    fail) echo "it went wrong"; exit 1 ;;
    not-run) echo "not here, and this is why"; exit 77 ;;
    crash) kill -SEGV $$ ;;
    hang) sleep 60 ;;
    deaf) trap '' TERM; for _ in {1..600}; do sleep 0.1; done ;;
    garbage) write '{"rows": [{'; exit 0 ;;
    wrong-form) write '{"rows": 5, "notes": "x"}'; exit 0 ;;
    not-finite) write '{"rows": [{"op": "attention", "median_ms": NaN}], "notes": []}'; exit 0 ;;
    write-and-hang) write "$good"; sleep 60 ;;
    once-*)
      if [[ ! -e $STUB/once ]]; then
        : >"$STUB/once"
        exit "${action#once-}"
      fi
      ;;
  esac
  break
done <"$STUB/rules"
write "$good"
"""

GPU = {
    "gpu": "NVIDIA H200",
    "multiprocessors": 132,
    "versions": {"torch": "2.11.0"},
    "python": "3.12",
    "uuid": "GPU-1",
}


# Variables that a run of the script, which also runs these tests, would pass on.
OF_THE_SCRIPT = {
    "BUDGET", "COMMIT", "LIBRARY", "PART", "PTXAS2", "REHEARSE", "SCRATCH", "SECOND", "STEP_LIMIT", "STEP_SECONDS",
    "TESTS_FIRST", "TORCH_CUDA_ARCH_LIST", "WHEELS",
}  # fmt: skip


class Calls:
    """gpu.sh in a separate folder."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.program("python", STUB)
        self.rules()
        self.facts(GPU)
        self.rows("forward", 1.1)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in OF_THE_SCRIPT},
            "OUT": str(self.out),
            "KEEP": str(folder / "keep"),
            "PYTHON": str(self.bin / "python"),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "STUB": str(folder),
            "STUB_PYTHON": sys.executable,
            "CUDA_HOME": str(folder / "no toolkit"),
            "STEP_SECONDS": "20",
        }
        (folder / "calls").touch()

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def rules(self, **actions):
        """Pattern and action; `_` stands for any character that is not a letter."""
        lines = [f"{pattern.replace('_', ' ').strip()}\t{action}\n" for pattern, action in actions.items()]
        (self.folder / "rules").write_text("".join(lines))

    def rule(self, *pairs):
        (self.folder / "rules").write_text("".join(f"{pattern}\t{action}\n" for pattern, action in pairs))

    def facts(self, found):
        (self.folder / "facts.json").write_text(json.dumps(found))

    def rows(self, step, milliseconds, **more):
        row = {"op": "attention", "pass": step, "shape": "b1 n8192 h24/1 d128", "dtype": "bfloat16"}
        row |= {"backend": "andromeda, no windows", "median_ms": milliseconds, "tflops": 620.0, **more}
        (self.folder / "rows.json").write_text(json.dumps({"rows": [row], "notes": ["a note"]}))

    def start(self, *arguments, **environment):
        return subprocess.Popen(
            [SCRIPT, *arguments],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments, code=0, watched=True, **environment):
        process = self.start(*arguments, **environment)
        with self.always_valid() if watched else contextlib.nullcontext():
            self.printed, _ = process.communicate(timeout=120)
        assert process.returncode == code, self.printed
        return self.data() if (self.out / "gpu.json").exists() else None

    @contextlib.contextmanager
    def always_valid(self):
        """Read gpu.json continuously."""
        broken, stop = [], threading.Event()

        def read():
            while not stop.wait(0.002):
                with contextlib.suppress(FileNotFoundError):
                    text = (self.out / "gpu.json").read_text()
                    try:
                        json.loads(text, parse_constant=broken.append)
                    except ValueError:
                        broken.append(text)

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert not broken

    def data(self):
        return json.loads((self.out / "gpu.json").read_text())

    def results(self):
        return {step: entry["result"] for step, entry in self.data()["steps"].items()}

    def wait_for(self, condition, process, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError, KeyError):
                if condition():
                    return
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        raise AssertionError(f"did not happen within {seconds} s: {self.data()}")


@pytest.fixture
def calls(tmp_path):
    return Calls(tmp_path)


SANITIZER = """#!/bin/bash
[[ $1 != --version ]] || exit 0
while [[ $1 != */python ]]; do shift; done
"$@"
code=$?
echo "ERROR SUMMARY: 0 errors"
exit $code
"""


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_every_step_passes(calls):
    calls.program("compute-sanitizer", SANITIZER)
    data = calls.run()
    assert list(data["steps"]) == STEPS
    assert calls.results() == dict.fromkeys(STEPS, "passed")
    assert data["environment"]["gpu"] == "NVIDIA H200"
    assert set(data["measured"]["bench"]) >= {"attn_forward", "attn_decode", "flex_backward", "model", "feed_forward"}
    assert data["measured"]["triton"]["triton"]["passed"] == 3
    assert data["measured"]["smoke"]["default"]["ptxas"] == "13.1.80"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert "ERROR SUMMARY" in (calls.out / f"gpu_{tool}.log").read_text()
    assert len(list(calls.out.iterdir())) <= 6
    assert "13.1.80" in calls.printed
    forward = [line for line in data["predictions"] if line["metric"] == "tflops" and " forward " in line["what"]]
    assert ("as expected", 1.0) in [(line["verdict"], line["of_middle"]) for line in forward]
    # FlexAttention is measured last, after all other results: it compiles for longer than the rest runs.
    measured = [line for line in (calls.folder / "calls").read_text().splitlines() if "benchmarks/attn.py" in line]
    assert ["flex" in line for line in measured] == [False] * 3 + [True] * 3


def test_steps_that_fail_do_not_stop_the_others(calls):
    calls.rule((" ", "fail"))
    calls.program("compute-sanitizer", SANITIZER)
    calls.run(code=1)
    assert calls.results() == dict.fromkeys(STEPS, "failed, exit code 1")
    assert "it went wrong" in calls.printed  # the end of a failing step's log
    assert set(calls.data()["measured"]) == set()


def test_steps_that_hang_are_ended_and_leave_what_they_had(calls):
    calls.rule((" ", "write-and-hang"))
    calls.program("compute-sanitizer", SANITIZER)
    data = calls.run(code=1, STEP_SECONDS="2")
    results = calls.results()
    for step in STEPS:  # the time for starting is missing for later steps
        assert results[step].startswith(("out of time after", "out of time before")), step
    assert results["build"].startswith("out of time after")
    assert data["measured"]["smoke"]["default"]["passed"] == 3


def test_a_step_that_ignores_the_end_of_its_time_is_killed(calls):
    calls.rule(("counters.py", "deaf"))
    calls.run("--only", "profile,wrappers", code=1, STEP_SECONDS="1", BUDGET="60")
    assert calls.results()["profile"] == "out of time after 1 s"


def test_steps_that_crash(calls):
    calls.rule((" ", "crash"))
    calls.run("--only", "build,smoke,quick,profile,wrappers", code=1)
    results = calls.results()
    assert results["profile"] == results["wrappers"] == "failed, ended by SIGSEGV"
    assert results["build"] == "failed, ended by SIGSEGV"
    assert results["smoke"] == results["quick"] == "failed, exit code 1"  # they go on to the next command


@pytest.mark.parametrize("action", ["garbage", "wrong-form"])
def test_results_that_cannot_be_read(calls, action):
    calls.rule(("qk_norm_rotary.py", action), ("test_wrappers", action))
    data = calls.run("--only", "quick,wrappers,profile", code=1)
    assert calls.results() == {
        "quick": "failed, results unreadable: qk_norm_rotary",
        "profile": "passed",
        "wrappers": "failed, results unreadable: wrappers",
    }
    assert data["measured"]["quick"]["attn_grid"]["rows"]
    assert "unreadable" in data["measured"]["quick"]["qk_norm_rotary"]


def test_numbers_that_json_does_not_know(calls):
    calls.rule(("counters.py", "not-finite"))
    data = calls.run("--only", "profile")
    assert data["measured"]["profile"]["counters"]["rows"] == [{"op": "attention", "median_ms": None}]


def test_tools_that_are_missing(calls):
    calls.rule(("counters.py", "not-run"))
    data = calls.run("--only", "profile,sanitizer")
    results = calls.results()
    assert results["profile"] == "not run: not here, and this is why"
    assert results["sanitizer"].startswith("not run: compute-sanitizer not found")
    assert data["steps"]["profile"]["clocks"] is None
    assert data["steps"]["profile"]["no_clocks"] in ("nvidia-smi gave none", "not looked at")


def test_a_spoilt_process_is_followed_by_another(calls):
    calls.rule(("attn_grid.py", "once-75"))
    calls.run("--only", "quick")
    assert (calls.folder / "calls").read_text().count("attn_grid.py") == 2
    calls.rule(("attn_grid.py", "crash"))
    calls.run("--only", "quick", code=1)
    assert (calls.folder / "calls").read_text().count("attn_grid.py") == 2 + 5


def test_other_tools_of_the_sanitizer_only_while_there_is_time(calls):
    calls.program("compute-sanitizer", SANITIZER)
    calls.run("--only", "sanitizer", STEP_SECONDS="21")
    assert (calls.out / "gpu_memcheck.log").exists()
    calls.run("--only", "sanitizer", STEP_SECONDS="15")
    assert "memcheck racecheck: no time left" in (calls.out / "gpu.log").read_text()


# ---- clocks ---------------------------------------------------------------------------------------------------------

NVIDIA_SMI = """#!/bin/bash
while :; do
  echo "$(date '+%Y/%m/%d %H:%M:%S.%3N'), 1755, 3201, {power}, 54"
  sleep 0.1
done
"""


@pytest.mark.parametrize("power", ["612.50", "[N/A]"])
def test_clocks_of_a_step_and_of_a_row(calls, power):
    calls.program("nvidia-smi", NVIDIA_SMI.format(power=power))
    now = time.time()
    calls.rows("forward", 1.1, measured_at=[now, now + 60])
    calls.rule(("counters.py", "write-and-hang"))
    data = calls.run("--only", "profile", code=1, STEP_SECONDS="2")
    for clocks in (data["steps"]["profile"]["clocks"], data["measured"]["profile"]["counters"]["rows"][0]["clocks"]):
        assert clocks["sm_mhz"] == [1755.0, 1755.0, 1755.0]
        assert clocks["celsius"] == [54.0, 54.0, 54.0]
        assert clocks["power_w"] == ([612.5] * 3 if power == "612.50" else None)
        assert clocks["samples"] >= 1
    assert subprocess.run(["pgrep", "-f", str(calls.bin / "nvidia-smi")], capture_output=True).returncode == 1


def test_clocks_that_are_no_numbers(calls):
    calls.program(
        "nvidia-smi", "#!/bin/bash\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
    )
    data = calls.run("--only", "profile")
    assert data["steps"]["profile"]["clocks"] is None
    assert data["steps"]["profile"]["no_clocks"] in ("nvidia-smi gave none", "not looked at")


# ---- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TERM", "KILL"])
def test_a_call_that_is_killed_leaves_what_it_had(calls, name):
    calls.rule(("test_wrappers", "write-and-hang"))
    process = calls.start("--only", "profile,wrappers", STEP_SECONDS="8")
    with calls.always_valid():
        calls.wait_for(lambda: calls.data()["measured"]["wrappers"]["wrappers"]["passed"] == 3, process)
        process.send_signal(signal.Signals[f"SIG{name}"])
        process.wait(timeout=20)
        time.sleep(0.5)
    assert process.returncode == (143 if name == "TERM" else -9)
    assert calls.results() == {"profile": "passed", "wrappers": "begun, did not end"}
    assert calls.data()["measured"]["profile"]["counters"]["rows"]


def test_a_case_is_written_while_its_step_goes_on(calls):
    calls.rule(("attn_grid.py", "write-and-hang"))
    process = calls.start("--only", "quick")
    calls.wait_for(lambda: calls.data()["measured"]["quick"]["attn_grid"]["rows"], process)
    assert calls.results() == {"quick": "begun, did not end"}
    process.terminate()
    process.wait(timeout=20)


def test_a_later_call_goes_on(calls):
    calls.run("--only", "profile", COMMIT="first")
    calls.rows("backward", 5.0)
    data = calls.run("--only=quick")
    assert calls.results() == {"profile": "passed", "quick": "passed"}
    assert data["measured"]["profile"]["counters"]["rows"][0]["pass"] == "forward"
    assert data["this_call"]["steps"] == ["quick"]
    assert "going on with" in calls.printed

    shutil.rmtree(calls.out)  # as where OUT is emptied between calls
    calls.rule(("test_wrappers", "fail"))
    calls.run("--only", "wrappers", code=1)
    assert calls.results() == {"profile": "passed", "quick": "passed", "wrappers": "failed, exit code 1"}
    calls.run("--only", "quick")  # passes, although the step of another call has not
    assert calls.results()["wrappers"] == "failed, exit code 1"
    data = calls.run("--only", "profile", "--budget", "0", code=1)
    assert calls.results()["profile"] == "passed"  # a step without time does not overwrite an earlier result
    assert data["this_call"]["results"] == {"profile": "out of time before it began"}


@pytest.mark.parametrize("change", ["sources", "gpu", "garbage"])
def test_a_later_call_starts_anew_where_the_results_are_of_something_else(calls, change):
    data = calls.run("--only", "profile")
    if change == "garbage":
        (calls.out / "gpu.json").write_text('{"environment": ')
    else:
        data["environment"][change] = "another"
        data["environment"]["commit"] = "0ld+changes"
        (calls.out / "gpu.json").write_text(json.dumps(data))
    if change == "gpu":  # OUT is emptied between calls
        (calls.out / "gpu.json").replace(calls.folder / "keep" / "gpu.json")
    calls.run("--only", "wrappers", watched=change != "garbage")
    assert calls.results() == {"wrappers": "passed"}
    assert "starting anew" in calls.printed
    [aside] = calls.out.glob("gpu-*.json")
    assert f"kept as {aside.name}" in calls.printed
    assert change == "garbage" or json.loads(aside.read_text()) == data


def test_the_budget_ends(calls):
    calls.rule(("counters.py", "hang"))
    calls.run("--only", "profile,wrappers", "--budget", "2", code=1)
    results = calls.results()
    assert results["profile"] in ("out of time after 2 s", "out of time after 1 s")
    assert results["wrappers"] == "out of time before it began"


def test_no_device(calls):
    calls.facts({**GPU, "gpu": None})
    assert calls.run(code=1) is None
    assert "finds no CUDA device" in calls.printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "build,bulid"], "--only knows build smoke"),
        (["--only"], "--only needs a value"),
        (["--budget", "soon"], "--budget must be a number of seconds, got 'soon'"),
        (["--fast"], "unknown argument '--fast'"),
    ],
)
def test_arguments_that_are_wrong(calls, arguments, message):
    calls.run(*arguments, code=2)
    assert message in calls.printed


def test_arguments_that_only_tell(calls):
    calls.run("--list")
    assert calls.printed.split() == [*STEPS, "host"]
    calls.run("--help")
    assert "BUDGET" in calls.printed
    assert "shellcheck" not in calls.printed


def test_wheels_that_cannot_be_installed(calls):
    calls.rule(("pip install", "fail"))
    calls.run("--only", "wrappers", WHEELS=str(calls.folder))
    assert "going on without" in calls.printed


# ---- two libraries --------------------------------------------------------------------------------------------------


def test_a_second_library(calls):
    """Built in addition to the first, with the other assembler and in its own tree; smoke runs with both."""
    told = '"${ANDROMEDA_PTXAS:-}, ${ANDROMEDA_BUILD_TREE:-}: $* in $PWD"'
    calls.program("python", STUB.replace('"$*" >>"$STUB/calls"', f'{told} >>"$STUB/calls"'))
    (calls.folder / "two").touch()
    data = calls.run("--only", "build,smoke", PTXAS2="/opt/ptxas")
    second = calls.folder / "keep" / "second"
    made = (calls.folder / "calls").read_text()
    assert f"/opt/ptxas, {second}-tree: setup.py build_ext --build-lib {second} " in made
    assert (second / "andromeda" / "model.py").resolve() == ROOT / "andromeda" / "model.py"
    assert not list((second / "andromeda").glob("_C*"))
    assert sorted(data["measured"]["smoke"]) == ["default", "second"]
    assert any(f"{ROOT}/tests/test_cuda.py" in line and line.endswith(f"in {second}") for line in made.splitlines())


@pytest.mark.parametrize("action", ["fail", "hang"])
def test_a_second_library_that_cannot_be_built(calls, action):
    calls.rule(("--build-lib", action))
    data = calls.run("--only", "build,smoke", STEP_SECONDS="10")
    assert calls.results() == {"build": "passed", "smoke": "passed"}
    assert list(data["measured"]["smoke"]) == ["default"]
    assert "the second library was not built" in (calls.out / "gpu.log").read_text()
    assert subprocess.run(["pgrep", "-f", str(calls.bin)], capture_output=True).returncode == 1  # nothing still runs


def test_the_library_of_a_folder_is_the_one_that_is_loaded(tmp_path):
    """`smoke` relies on this: a process that starts in the folder imports the package there."""
    package = tmp_path / "andromeda"
    package.mkdir()
    for file in (ROOT / "andromeda").iterdir():
        if file.name.startswith("_C."):
            shutil.copy(file, package)
        elif file.name != "__pycache__":
            (package / file.name).symlink_to(file)
    if not list(package.glob("_C.*")):
        pytest.skip("the extension is not built in place")
    (tmp_path / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PART": str(tmp_path / "part.json")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_report", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir", str(tmp_path), str(tmp_path)]
    environment["LIBRARY"] = str(tmp_path)
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    part = json.loads((tmp_path / "part.json").read_text())
    assert (ROOT / part["library"]).resolve().parent == package.resolve()
    assert (part["passed"], part["finished"]) == (1, True)


def test_equal_libraries_are_one(tmp_path, monkeypatch, capsys):
    second = tmp_path / "second"
    (tmp_path / "parts" / "build").mkdir(parents=True)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    for versions, note in ((["13.0.88", "13.1.80"], "two assemblers"), (["13.1.80"] * 2, "only one assembler here")):
        second.mkdir()
        answers = iter(versions)
        monkeypatch.setattr(gpu_report, "assembler_of", lambda folder, answers=answers: next(answers))
        gpu_report.libraries(str(second))
        assert note in capsys.readouterr().out
        assert (second / "complete").exists() == second.exists() == (note == "two assemblers")
        shutil.rmtree(second, ignore_errors=True)


# ---- the plugin -----------------------------------------------------------------------------------------------------


def run_plugin(folder, text, *arguments, **variables):
    """With a package that stands in for andromeda, since importing torch takes seconds."""
    (folder / "andromeda" / "ops").mkdir(parents=True, exist_ok=True)
    (folder / "andromeda" / "ops" / "_select.py").write_text("extension = None\n")
    (folder / "test_it.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PART": str(folder / "part.json"), **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_report", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir", str(folder), *arguments, str(folder)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    part = folder / "part.json"
    return result, json.loads(part.read_text()) if part.exists() else None


def test_counts(tmp_path):
    text = """
import os, pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "of no use"
@pytest.mark.skip(reason="no GPU")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("fixture")
def test_error(broken): pass
def test_end(): os._exit(9)
"""
    result, part = run_plugin(tmp_path, text)
    assert result.returncode == 9
    assert (part["passed"], part["failed"], part["skipped"], part["finished"]) == (1, 2, 1, False)
    assert [failure["test"] for failure in part["failures"]] == ["test_it.py::test_bad", "test_it.py::test_error"]
    assert "of no use" in part["failures"][0]["text"]
    assert part["skips"] == {"Skipped: no GPU": 1}


def test_some_tests_run_first(tmp_path):
    text = "".join(f"def test_{name}(): print('ran {name}')\n" for name in ("a", "forward", "b", "backward"))
    result, _ = run_plugin(tmp_path, text, "-s", TESTS_FIRST="forward backward")
    assert re.findall(r"ran (\w+)", result.stdout) == ["forward", "backward", "a", "b"]


def test_skipped_tests_alone_are_no_success(tmp_path):
    result, part = run_plugin(tmp_path, "import pytest\ndef test_a(): pytest.skip('no GPU')\n")
    assert result.returncode == 1
    assert (part["passed"], part["skipped"], part["finished"]) == (0, 1, True)
    assert run_plugin(tmp_path, "def test_a(): pass\n", "--collect-only")[0].returncode == 0


def test_a_library_of_another_folder_is_refused(tmp_path):
    result, part = run_plugin(tmp_path, "def test_a(): pass\n", LIBRARY=str(tmp_path / "second"))
    assert result.returncode == 4
    assert f"the library must come from {tmp_path / 'second'}" in result.stderr
    assert part is None


def test_a_rehearsal_is_not_called_a_pass(monkeypatch):
    assert gpu_report.result_of("0", 1, 10) == "passed"
    monkeypatch.setenv("REHEARSE", "1")
    assert gpu_report.result_of("0", 1, 10) == "rehearsed: no GPU, tests only collected"
    assert gpu_report.result_of("1", 1, 10) == "failed, exit code 1"
