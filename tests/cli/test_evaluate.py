"""`andromeda eval`."""

import json

from commands import failing, run


def test_eval_prints_and_writes_the_same_figures(trained, rows, corpus, tmp_path, capsys):
    words = ["--device", "cpu", "--json", tmp_path / "figures.json"]
    assert run("eval", trained, rows, "--max-rows", "9", *words) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"loss           {figures['loss']:.4f} nats per token, over {figures['tokens']:,} tokens" in shown
    assert f"bits per byte  {figures['bits_per_byte']:.4f}" in shown
    assert figures["tokens"] == 9 * 31


def test_eval_packs_a_text_itself(trained, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ANDROMEDA_CACHE", str(tmp_path))
    assert run("eval", trained, corpus, "--max-rows", "4", "--device", "cpu") == 0
    assert "over 124 tokens" in capsys.readouterr().out  # rows as long as the window of the model
    assert run("eval", trained, corpus, "--max-rows", "4", "--device", "cpu", "--seq-len", "16") == 0
    assert "over 60 tokens" in capsys.readouterr().out


def test_eval_refuses_rows_of_another_tokenizer(trained, corpus, tmp_path, capsys):
    assert run("build-dataset", corpus, "--train-tokenizer", "300", "--seq-len", "32", "--out", tmp_path / "rows") == 0
    capsys.readouterr()
    code, said = failing(capsys, "eval", trained, tmp_path / "rows", "--device", "cpu")
    assert code == 2 and "packed with another tokenizer" in said
