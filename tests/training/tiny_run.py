"""A tiny model, rows that it can learn, and settings of a short run, for training tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from andromeda import Andromeda, files
from andromeda.training import MANIFEST, TrainSettings, sealed

SIZES = {"num_tokens": 320, "max_seq_len": 16, "dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "alibi_num_heads": 1}


TEXTS = ["def add(a, b):\n    return a + b\n", "for name in names:\n    print(name)\n", "naïve café ☕"] * 40


class Rows(torch.utils.data.Dataset):
    """Rows that count up from different starts, which a tiny model can learn.

    fail_at: the number of rows, read since `begin`, at which the run ends as if killed.
    """

    def __init__(self, count=24, seqlen=12, fail_at=None):
        start = torch.arange(count)[:, None] * 7
        self.ids = (start + torch.arange(seqlen)) % 50 + 2
        self.ids_read, self.fail_at = -(10**6), fail_at

    def begin(self):
        self.ids_read = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.ids_read += 1
        if self.ids_read == self.fail_at:
            raise Killed
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


class Killed(BaseException):
    """Ends a run like a signal that cannot be caught: no handler of `Exception` runs."""


def new_model() -> Andromeda:
    torch.manual_seed(5)
    return Andromeda(**SIZES)


def settings(folder, **options) -> TrainSettings:
    fast = {"steps": 8, "batch_size": 2, "learning_rate": 1e-2, "log_every": 2, "save_every": 2, "device": "cpu"}
    return TrainSettings(output_dir=str(folder), **{**fast, **options})


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict, expected: dict):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def step_of_checkpoint(checkpoint) -> int:
    return json.loads((Path(checkpoint) / MANIFEST).read_text())["step"]


def has_finite_weights(folder) -> bool:
    return all(bool(value.isfinite().all()) for value in load_file(Path(folder) / "model.safetensors").values())


def history(folder, without=("tokens_per_second",)) -> list[dict]:
    lines = [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in without} for line in lines]


class Masked(Rows):
    """Rows; those with certain indices have no labels."""

    def __init__(self, *args, masked=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.masked = masked

    def __getitem__(self, index):
        row = super().__getitem__(index)
        if index in self.masked:
            row["labels"][1:] = -100  # the first is predicted from nothing
        return row


def seal_again(folder):
    """Write a new manifest, as if the files in a checkpoint had been written as they are now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["xxh3_128"]
    manifest["files"] = files.checksums(folder, manifest["files"])
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
