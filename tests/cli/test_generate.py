"""`andromeda generate`."""

import pytest
import torch
from commands import failing, run

from andromeda import Andromeda


def test_generate_streams_prompt_and_continuation(trained, capsys):
    words = ["generate", trained, "--prompt", "def naïve(", "--tokens", "12", "--device", "cpu", "--seed", "1"]
    assert run(*words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("def naïve(") and out.endswith("\n") and len(out) > len("def naïve(\n")
    assert "12 tokens in" in err
    assert run(*words, "--no-prompt") == 0
    assert "def naïve(" + capsys.readouterr().out == out


@pytest.mark.parametrize("sampling", ["--top-k 5", "--top-p 0.5", "--min-p 0.2", "--temperature 0"])
def test_generate_samples_as_told(trained, tmp_path, capsys, sampling):
    (tmp_path / "prompt.txt").write_text("class ")
    words = ["--prompt-file", tmp_path / "prompt.txt", "--tokens", "5", "--device", "cpu", *sampling.split()]
    assert run("generate", trained / "checkpoint-6", *words) == 0
    assert capsys.readouterr().out.startswith("class ")


def test_generate_with_a_model_saved_by_andromeda(trained, tmp_path, capsys):
    torch.manual_seed(0)
    model = Andromeda(num_tokens=400, max_seq_len=32, dim=32, depth=1, dim_head=16, heads=2, alibi_num_heads=1)
    model.save(tmp_path / "plain")
    words = ["--prompt", "x", "--tokens", "3", "--device", "cpu"]
    code, said = failing(capsys, "generate", tmp_path / "plain", *words)
    assert code == 2 and "say which tokenizer with --tokenizer" in said
    assert run("generate", tmp_path / "plain", *words, "--tokenizer", trained / "model") == 0


def test_generate_refuses(trained, tmp_path, capsys):
    code, said = failing(capsys, "generate", tmp_path / "nowhere", "--prompt", "x")
    assert code == 2 and "nowhere does not exist" in said
    code, said = failing(capsys, "generate", tmp_path, "--prompt", "x")
    assert code == 2 and "is no saved model" in said
    code, said = failing(capsys, "generate", trained)
    assert code == 2 and "one of the arguments --prompt --prompt-file is required" in said


@pytest.mark.parametrize("way", ["--prompt", "--prompt-file"])
def test_a_prompt_that_is_not_utf8(trained, tmp_path, capsys, way):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    value = "caf\udce9" if way == "--prompt" else tmp_path / "prompt.txt"
    code, said = failing(capsys, "generate", trained, way, value)
    assert code == 2 and "UTF-8, got the byte 0xe9 at offset 3" in said
