"""SIGKILL during `build-dataset` and during training of a tokenizer: the same result afterwards, no leftovers.

One process loads everything and forks for each attempt. The fork kills itself before its n-th operation on files or
pipes; a second fork then completes the same work.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from andromeda import files

TRIES = 20

FORKS = '''if True:
    import json, os, shutil, signal, sys, time
    from pathlib import Path

    import datasets, numpy, pyarrow, torch
    from andromeda import files
    from andromeda.cli import main as command
    from andromeda.data import packing, workers
    from andromeda.data.packed import PackedDataset
    from andromeda.data.tokenizer import AndromedaTokenizer

    root, tries = Path(sys.argv[1]), int(sys.argv[2])
    files._STALE_SECONDS = 0  # what an earlier fork left is old enough
    torch.set_num_threads(1)
    EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "subprocess.Popen"}

    def die_before(number, report):
        count = 0

        def step():
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event, args):
            if event in EVENTS and (event == "subprocess.Popen" or str(root) in str(args[0])):
                step()

        def stepping(function):
            def call(*args):
                step()
                return function(*args)
            return call

        sys.addaudithook(hook)
        os.fsync = stepping(os.fsync)
        packing._HashedFile.write = stepping(packing._HashedFile.write)
        workers._write_frame, workers._read_frame = map(stepping, (workers._write_frame, workers._read_frame))
        start = workers._Process.__init__

        def started(self, *args):
            start(self, *args)
            report.write(f"{self._process.pid}\\n")
            report.flush()

        workers._Process.__init__ = started
        return lambda: count

    def fork(work, number):
        """Run `work` in a fork that dies before this operation; its status, and what it wrote to `report`."""
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            report = os.fdopen(writing, "w")
            status = 1
            try:
                count = die_before(number, report)
                status = work() or 0
                print("operations", count(), file=report, flush=True)
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading) as report:
            lines = report.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return status, lines

    def is_running(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def kills(name, work, content, tries):
        folder = root / name
        folder.mkdir()
        os.chdir(folder)
        status, lines = fork(work, 0)
        assert status == 0, (status, lines)
        operations, expected, names = int(lines[-1].split()[1]), content(), sorted(os.listdir())
        assert operations >= tries, operations
        outcome = {"operations": operations, "killed": 0, "same": 0, "leftovers": [], "orphans": 0}
        for index in range(tries):
            for entry in os.listdir():
                shutil.rmtree(entry)
            status, lines = fork(work, 1 + index * (operations - 1) // (tries - 1))
            outcome["killed"] += status == -signal.SIGKILL
            deadline = time.monotonic() + 20
            orphans = [int(line) for line in lines if line.isdigit()]
            while any(map(is_running, orphans)) and time.monotonic() < deadline:
                time.sleep(0.01)
            outcome["orphans"] += sum(map(is_running, orphans))
            # Something is there only if it is whole; the command does not replace it.
            if not (name != "tokenizer" and Path("out").exists()):
                status, lines = fork(work, 0)
                assert status == 0, (status, lines)
            outcome["same"] += content() == expected
            outcome["leftovers"] += sorted(set(os.listdir()) - set(names)) + [
                str(path) for path in Path("out").rglob(".*")
            ]
        return outcome

    texts = [" ".join(f"word{i * j % 97}" for j in range(2 + 7 * i % 40)) for i in range(60)]

    def train():
        AndromedaTokenizer.train(texts, 400).save("out")

    def build(kind):
        words = ["build-dataset", root / "corpus.jsonl", "--tokenizer", root / "made", "--out", "out"]
        return lambda: command.main(list(map(str, [*words, "--seq-len", 16, "--packing", kind])))

    def whole_rows():
        PackedDataset("out").verify()
        return {path.relative_to("out"): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}

    def saved_tokenizer():
        return {path.name: path.read_bytes() for path in Path("out").iterdir()}

    # The corpus is packed in the forks alone: threads of tokenizers would not survive a fork.
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\\n" for text in texts))
    AndromedaTokenizer.train(texts, 400).save(root / "made")
    AndromedaTokenizer(root / "made", None, None).tokenize_texts("loads what is loaded late")
    outcomes = {"tokenizer": kills("tokenizer", train, saved_tokenizer, tries)}
    for kind in ("stream", "bfd"):
        outcomes[kind] = kills(kind, build(kind), whole_rows, tries // 2)
    print(json.dumps(outcomes))
'''


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    if not Path("/proc/self/stat").exists():
        pytest.skip("reads /proc to see which processes run")
    result = subprocess.run(
        [sys.executable, "-c", FORKS, tmp_path_factory.mktemp("kills"), str(TRIES)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(("work", "tries"), [("tokenizer", TRIES), ("stream", TRIES // 2), ("bfd", TRIES // 2)])
def test_the_result_is_the_same_after_a_kill(outcomes, work, tries):
    outcome = outcomes[work]
    assert outcome.pop("operations") >= tries
    assert outcome == {"killed": tries, "same": tries, "leftovers": [], "orphans": 0}


def test_the_age_that_is_waited_for_is_short():
    """The forks set it to zero; without that, the same happens a minute after a kill."""
    assert files._STALE_SECONDS == 60
