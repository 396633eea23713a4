"""Training and saving, each killed at 20 points spread over all file operations, then resumed or loaded.

One process imports everything and forks: a child that is killed before its n-th operation, and another that resumes.
Run as a program with the path of an empty folder, this file does all of this and prints its results as JSON.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

POINTS = 20
TRAIN = (
    "--steps 4 --save-every 2 --log-every 1 --eval-every 2 --keep 1 --device cpu --batch-size 2 --learning-rate 1e-2"
)
MODEL = "--dim 16 --depth 1 --heads 2 --dim-head 8 --alibi-num-heads 1"


def test_twenty_kills_of_train_and_of_save(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["faults"] == []
    for kind in ("train", "save"):
        assert found[kind]["killed"] == POINTS, "a kill that did not happen shows nothing"
        assert found[kind]["operations"] >= POINTS
    assert found["train"]["before the run's file"] >= 1 and found["train"]["after a checkpoint"] >= 5
    assert min(found["save"][kind] for kind in ("absent", "old", "new")) >= 1


class Operations:
    """Counts the file operations of this process, and kills it before operation number `last`."""

    def __init__(self, last: int | None = None):
        self.last, self.count = last, 0
        for name in ("fsync", "replace", "rename"):
            setattr(os, name, self._counting(getattr(os, name)))
        sys.addaudithook(self._hook)

    def _counting(self, function):
        def counted(*arguments, **options):
            self._next()
            return function(*arguments, **options)

        return counted

    def _hook(self, event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.remove", "os.rmdir"):
            self._next()

    def _next(self):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(function) -> int:
    """Run `function` in a fork and return the signal that ended it; raises for any other failure."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a child failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def number_of_operations(function, folder: Path) -> int:
    def counted():
        operations = Operations()
        function()
        (folder / "count").write_text(str(operations.count))

    in_child(counted)
    return int((folder / "count").read_text())


def points(operations: int, number: int) -> list[int]:
    """Numbers spread over all operations, including the first and the last one."""
    return [1 + (operations - 1) * index // (number - 1) for index in range(number)]


def killed_before(operation: int, function) -> bool:
    def run():
        Operations(operation)
        function()

    return in_child(run) == signal.SIGKILL


def command(*words) -> None:
    from andromeda.cli.main import main

    assert main([str(word) for word in words]) == 0


def kills_of_train(folder: Path, faults: list) -> dict:
    import torch
    from safetensors.torch import load_file

    rows = folder / "rows"
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text()[:4000])
    build = ("build-dataset", text, "--train-tokenizer", "300", "--seq-len", "16", "--out", rows)
    in_child(lambda: command(*build))  # tokenizers start threads, which a fork must not have

    def start(out, *words):
        command("train", rows, "--out", out, "--eval-data", rows, *TRAIN.split(), *MODEL.split(), *words)

    def result(out: Path) -> dict:
        """Everything that a run leaves except its speed: weights, optimiser, random state, schedule, figures, names."""
        checkpoint = out / "checkpoint-4"
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("tokens_per_second", None)
        loaded = {name: load_file(out / name / "model.safetensors") for name in ("model", "checkpoint-4")}
        for name in ("optimizer.pt", "scheduler.pt"):
            loaded[name] = torch.load(checkpoint / name)
        loaded["rng_state.pth"] = torch.load(checkpoint / "rng_state.pth", weights_only=False)
        names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
        return {"weights and state": loaded, "history": lines, "names": names}

    expected = folder / "expected"
    start(expected)
    expected = result(expected)
    operations = number_of_operations(lambda: start(folder / "counted"), folder)
    counts = {"operations": operations, "killed": 0, "before the run's file": 0, "after a checkpoint": 0}
    for point in points(operations, POINTS):
        out = folder / f"train-{point}"
        counts["killed"] += killed_before(point, lambda out=out: start(out))
        known = (out / "train.json").is_file()
        counts["before the run's file"] += not known
        counts["after a checkpoint"] += any(out.glob("checkpoint-*"))
        if known:
            in_child(lambda out=out: command("train", "--out", out, "--resume"))
        elif out.is_dir() and point % 2:
            in_child(lambda out=out: start(out, "--resume"))
        else:
            in_child(lambda out=out: start(out))
        found = result(out)
        faults += [
            f"train killed before operation {point}: other {name}"
            for name in expected
            if not same(found[name], expected[name])
        ]
        shutil.rmtree(out)
    return counts


def same(first, second) -> bool:
    """Equality of nested structures with tensors and arrays in them."""
    import numpy
    import torch

    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return numpy.array_equal(first, second) if isinstance(first, numpy.ndarray) else first == second


def kills_of_save(folder: Path, faults: list) -> dict:
    import torch

    from andromeda import Andromeda

    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(Andromeda(num_tokens=64, max_seq_len=8, dim=16, depth=1, dim_head=8, heads=2, alibi_num_heads=1))
    old, new = models

    def prepare(name: str, present: bool) -> Path:
        path = folder / name / "model"
        path.parent.mkdir()
        if present:
            old.save(path)
        return path

    def kind_of(path: Path) -> str:
        if not path.exists():
            return "absent"
        found = dict(Andromeda.load(path).state_dict())
        kinds = [kind for kind, model in (("old", old), ("new", new)) if same(found, dict(model.state_dict()))]
        return kinds[0] if kinds else "neither the old weights nor the new ones"

    counts = {"operations": 0, "killed": 0, "absent": 0, "old": 0, "new": 0}
    for present in (False, True):
        counted = prepare(f"counted-{present}", present)
        operations = number_of_operations(lambda path=counted: new.save(path), folder)
        counts["operations"] += operations
        for turn, point in enumerate(points(operations, POINTS // 2)):
            path = prepare(f"save-{present}-{turn}", present)
            counts["killed"] += killed_before(point, lambda path=path: new.save(path))
            kind = kind_of(path)
            if kind in (("old" if present else "absent"), "new"):
                counts[kind] += 1
            else:
                faults.append(f"save killed before operation {point}: {kind}")
            new.save(path)
            if kind_of(path) != "new":
                faults.append(f"save after a kill before operation {point}: not the new weights")
    return counts


def main(folder: Path) -> dict:
    import andromeda.training  # noqa: F401 - all imports before the first fork

    # Only the findings go to stdout; figures and progress of the runs go to stderr.
    stdout = os.dup(1)
    os.dup2(2, 1)
    faults: list[str] = []
    found = {"train": kills_of_train(folder, faults), "save": kills_of_save(folder, faults), "faults": faults}
    sys.stdout.flush()
    os.dup2(stdout, 1)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
