"""`andromeda eval`."""

import json
import math

import pytest
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


def test_exact_evaluates_whole_documents(trained, corpus, tmp_path, capsys):
    """The same figures on the screen and in the file, which also lists the documents."""
    extra = tmp_path / "documents.jsonl"
    extra.write_text(corpus.read_text() + '{"text": ""}\n')
    words = ["--exact", "--device", "cpu", "--json", tmp_path / "figures.json"]
    assert run("eval", trained, extra, *words) == 0
    shown, said = capsys.readouterr()
    figures = json.loads((tmp_path / "figures.json").read_text())
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    documents = figures["per_document"]
    assert [document["bytes"] for document in documents] == [*(len(text.encode()) for text in texts), 0]
    assert documents[-1]["where"] == f"{extra}, line {len(texts) + 1}, column 'text'"
    assert figures["documents"] == len(texts) and figures["empty_documents"] == 1
    assert figures["tokens"] == sum(document["tokens"] for document in documents)
    nats = sum(document["nll"] for document in documents)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / figures["bytes"])
    assert f"over {figures['tokens']:,} tokens" in shown
    assert f"bits per byte  {figures['bits_per_byte']:.4f}" in shown
    assert f"documents      {len(texts)} with {figures['bytes']:,} bytes" in shown
    assert f"empty          1 without a token: {extra}, line {len(texts) + 1}" in shown
    assert figures["window"] == figures["stride"] == 32
    assert "differ from those without --exact" in said


def test_exact_options(trained, corpus, tmp_path, capsys):
    words = ["--exact", "--device", "cpu", "--max-documents", "2", "--json", tmp_path / "figures.json"]
    losses = []
    for more in ([], ["--stride", "8"], ["--seq-len", "16"], ["--batch-size", "1"]):
        assert run("eval", trained, corpus, *words, *more) == 0
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert len(figures["per_document"]) == 2
        losses.append(figures["loss"])
    assert losses[3] == pytest.approx(losses[0], rel=1e-6)
    assert len({round(loss, 5) for loss in losses[:3]}) == 3


@pytest.mark.parametrize(
    "words, text",
    [
        (["--exact", "--max-rows", "3"], "--max-documents limits it"),
        (["--exact", "--no-doc-mask"], "no window reaches beyond its document"),
        (["--stride", "3"], "--stride needs --exact"),
        (["--max-documents", "3"], "--max-documents needs --exact"),
        (["--seq-len", "1"], "at least 2 for rows"),
    ],
)
def test_options_that_would_be_ignored_are_refused(trained, corpus, capsys, words, text):
    code, said = failing(capsys, "eval", trained, corpus, "--device", "cpu", *words)
    assert code == 2 and text in said


def test_exact_needs_text(trained, rows, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    code, said = failing(capsys, "eval", trained, rows, "--exact", "--device", "cpu", "--json", figures)
    assert code == 2 and "packed rows" in said and "name the text that they were packed from" in said
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    code, said = failing(
        capsys, "eval", trained, tmp_path / "empty.jsonl", "--exact", "--device", "cpu", "--json", figures
    )
    assert code == 1 and "got 1 documents without a token" in said
    assert not figures.exists()
