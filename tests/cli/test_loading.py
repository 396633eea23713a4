"""Finding and loading models, devices and prompts."""

import io
import json
import os
import shutil
import sys
import warnings

import pytest
import torch
from commands import failing, run

from andromeda import Andromeda, files, training
from andromeda.cli import console, loading


@pytest.mark.parametrize("inside", [".", "model"])
@pytest.mark.parametrize("file", ["config.json", "andromeda.json"])
def test_a_model_is_found_in_a_run(tmp_path, inside, file):
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    (folder / file).write_text("{}")
    assert loading.find_model(str(tmp_path)) == folder


def test_no_model(tmp_path):
    with pytest.raises(console.UsageError, match="is no saved model"):
        loading.find_model(str(tmp_path))
    with pytest.raises(console.UsageError, match="does not exist"):
        loading.find_model(str(tmp_path / "nowhere"))


def test_a_config_that_describes_no_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "andromeda", "hidden_size": 0}))
    with pytest.raises(ValueError, match=r"config.json describes no model: .*"):
        loading.load_model(tmp_path, "cpu", None)


# ---- models that are damaged


@pytest.fixture
def saved(tmp_path):
    model = Andromeda(num_tokens=300, max_seq_len=16, dim=32, depth=1, dim_head=16, heads=2, alibi_num_heads=1)
    model.save(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_said(saved, capsys, value):
    model, folder = saved
    assert training.nonfinite_parameters(loading.load_model(folder, "cpu", None, finite=True)) == []
    assert capsys.readouterr().err == ""
    name, parameter = list(model.named_parameters())[3]
    with torch.no_grad():
        parameter.view(-1)[1] = value
    model.save(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the message is the only report
        loading.load_model(folder, "cpu", None)
    assert f"1 of {len(list(model.parameters()))} parameters of {folder} are not finite: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"are not finite: .*{name}"):
        loading.load_model(folder, "cpu", None, finite=True)


@pytest.mark.parametrize("name", ["model.safetensors", "andromeda.json"])
def test_a_flipped_byte_is_found_where_checksums_are_kept(saved, name):
    _, folder = saved
    manifest = {"format": 2, "step": 1, "run": {}, "files": files.checksums(folder)}
    files.write_json(folder / training.MANIFEST, training.sealed(manifest))
    loading.load_model(folder, "cpu", None)
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{folder} is damaged: {name} has other content"):
        loading.load_model(folder, "cpu", None)
    (folder / training.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=f"{training.MANIFEST} is damaged"):
        loading.load_model(folder, "cpu", None)


def test_weights_that_are_not_finite(trained, rows, tmp_path, capsys):
    """`generate` warns and continues; `eval` refuses, because the figures of such a model are meaningless."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(trained / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for recorded in folder.glob("andromeda*.json"):
        recorded.unlink()  # a training run that diverged would have recorded these weights
    words = ["--prompt", "x", "--tokens", "2", "--device", "cpu", "--temperature", "0"]
    run("generate", folder, *words)
    assert "parameters of" in capsys.readouterr().err
    code, said = failing(capsys, "eval", folder, rows, "--device", "cpu")
    assert code == 1 and "are not finite" in said and "take an earlier checkpoint" in said


# ---- devices


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


NO_DEVICE = [
    "cuda",
    "cuda:0",
    "cuda:9",
    "mps",
    "xpu",
    "meta",
    "gpu",
    "CPU",
    "cpu:0",
    "",
    " cpu",
    "cuda:",
    "cuda:-1",
    "cuda:٣",
]


@pytest.mark.parametrize("name", NO_DEVICE)
def test_devices_that_are_not_here(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    for read in (loading.read_device, loading.training_device):
        with pytest.raises(console.UsageError) as caught:
            read(name)
        assert str(caught.value).startswith(f"--device must be cpu, got {name!r}; torch {torch.__version__} ")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(console.UsageError, match="sees no NVIDIA GPU, CUDA_VISIBLE_DEVICES is '7'"):
        loading.read_device(name)


@pytest.mark.parametrize("name", sorted({*NO_DEVICE, "cuda:2"} - {"cuda", "cuda:0"}))
def test_devices_beside_the_gpus(two_gpus, name):
    with pytest.raises(console.UsageError, match=r"--device must be cpu or cuda:0 or cuda:1, got '"):
        loading.read_device(name)


def test_devices_that_are_here(monkeypatch, two_gpus):
    assert loading.read_device(None) == loading.read_device("cuda") == torch.device("cuda")
    assert loading.read_device("cuda:1") == torch.device("cuda:1") and loading.read_device("cpu") == torch.device("cpu")
    assert loading.training_device("cpu") == "cpu"
    assert loading.training_device(None) is loading.training_device("cuda") is loading.training_device("cuda:0") is None
    with pytest.raises(console.UsageError, match="CUDA_VISIBLE_DEVICES=1 chooses"):
        loading.training_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.read_device(None) == torch.device("cpu")


def test_a_device_that_is_not_here(trained, rows, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["generate", trained, "--prompt", "x"], ["eval", trained, rows], ["quickstart", "--out", "never"]):
        for device in ("cuda", "mps", "gpu"):
            code, said = failing(capsys, *words, "--device", device)
            assert code == 2 and said.startswith(f"andromeda: error: --device must be cpu, got '{device}'; torch ")


# ---- prompts


class Stdin:
    def __init__(self, data):
        self.buffer = io.BytesIO(data)


def prompt_in(way, data, tmp_path, monkeypatch):
    """The three ways to pass a prompt."""
    if way == "--prompt":
        return loading.read_prompt(os.fsdecode(data), None)
    if way == "-":
        monkeypatch.setattr(sys, "stdin", Stdin(data))
        return loading.read_prompt(None, "-")
    (tmp_path / "prompt.txt").write_bytes(data)
    return loading.read_prompt(None, str(tmp_path / "prompt.txt"))


@pytest.mark.parametrize("way", ["--prompt", "-", "file"])
@pytest.mark.parametrize(
    "data, offset", [(b"caf\xe9", 3), (b"\xff\xfeh\0", 0), ("naïve".encode() + b"\xc3", 6), (b"\xed\xa0\x80", 0)]
)
def test_prompts_that_are_not_utf8(tmp_path, monkeypatch, way, data, offset):
    with pytest.raises(console.UsageError, match="must be text in UTF-8") as caught:
        prompt_in(way, data, tmp_path, monkeypatch)
    said = str(caught.value)
    assert f"got the byte 0x{data[offset]:02x} at offset {offset};" in said
    assert {"--prompt": "--prompt", "-": "standard input", "file": str(tmp_path / "prompt.txt")}[way] in said


@pytest.mark.parametrize("way", ["--prompt", "-", "file"])
def test_prompts(tmp_path, monkeypatch, way):
    assert prompt_in(way, "naïve 🙂".encode(), tmp_path, monkeypatch) == "naïve 🙂"
    assert prompt_in(way, b"", tmp_path, monkeypatch) == ""


def test_prompts_of_other_systems(tmp_path, monkeypatch):
    assert prompt_in("file", b"\xef\xbb\xbfa\r\nb\rc", tmp_path, monkeypatch) == "a\nb\nc"
    with pytest.raises(console.UsageError, match="byte 0xe9 at offset 4"):
        prompt_in("file", b"\xef\xbb\xbfa\xe9", tmp_path, monkeypatch)


def test_prompts_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(console.UsageError, match="must be a file, got the folder"):
        loading.read_prompt(None, str(tmp_path))
    with pytest.raises(console.UsageError, match="does not exist"):
        loading.read_prompt(None, str(tmp_path / "x"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(console.UsageError, match="standard input, which is closed"):
        loading.read_prompt(None, "-")
