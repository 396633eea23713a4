"""What `andromeda serve` refuses before it starts a server; tests/ecosystem/test_serving.py talks to one."""

import importlib.util
import shutil
import socket

import pytest
import torch
from commands import failing, run

from andromeda import Andromeda
from andromeda.cli import serve


@pytest.fixture
def installed(monkeypatch):
    """As if the packages of a server were there, whatever is installed."""
    monkeypatch.setattr(serve, "_check_packages", lambda: None)


def test_continuous_batching_is_refused_with_the_reason(capsys):
    code, said = failing(capsys, "serve", "anything", "--continuous-batching")
    assert code == 2 and "the cache of this model also holds the token shift" in said and "one after the other" in said


def test_missing_packages_are_named(trained, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("fastapi", "uvicorn") else find(name)
    )
    code, said = failing(capsys, "serve", trained)
    assert code == 1 and "serve needs fastapi" in said and "uvicorn" in said
    assert "pip install 'transformers[serving]'" in said


def test_a_port_in_use_is_noticed_before_the_model_is_loaded(trained, capsys, monkeypatch, installed):
    monkeypatch.setattr(serve, "load_model", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = failing(capsys, "serve", trained, "--host", "127.0.0.1", "--port", port, "--device", "cpu")
    assert (
        code == 1 and f"serve: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port" in said
    )


@pytest.mark.parametrize(
    "words, text",
    [
        (["--port", "0"], "argument --port: must be a whole number from 1 to 65535, got '0'"),
        (["--chat-template", "nowhere.jinja"], "--chat-template: nowhere.jinja must be a text file in UTF-8"),
        (["--compile"], "unrecognized arguments: --compile"),
    ],
    ids=["port", "template", "unknown option"],
)
def test_wrong_options(trained, capsys, installed, words, text):
    code, said = failing(capsys, "serve", trained, "--device", "cpu", *words)
    assert code == 2 and text in said


def test_what_is_no_model_or_has_no_tokenizer(tmp_path, capsys, installed):
    code, said = failing(capsys, "serve", tmp_path)
    assert code == 2 and "is no saved model" in said
    torch.manual_seed(0)
    model = Andromeda(num_tokens=400, max_seq_len=32, dim=32, depth=1, dim_head=16, heads=2, alibi_num_heads=1)
    model.save(tmp_path / "plain")
    code, said = failing(capsys, "serve", tmp_path / "plain")
    assert code == 2 and "say which tokenizer with --tokenizer" in said


@pytest.mark.parametrize("template", ["none", "saved with the tokenizer", "given"])
def test_a_run_is_served_under_the_name_that_was_given(trained, tmp_path, monkeypatch, installed, template):
    served = {}

    def note(name, model, tokenizer, **options):
        served.update(options, name=name, template=tokenizer.chat_template, generation=model.generation_config)
        served["end"] = tokenizer.eos_token_id

    monkeypatch.setattr(serve, "_serve", note)
    folder = tmp_path / "run"
    shutil.copytree(trained / "model", folder)
    (folder / "generation_config.json").unlink()
    (folder / "andromeda_checkpoint.json").unlink()
    if template != "none":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "chat.jinja").write_text("{{ bos_token }}{{ messages }}")
    words = ["--chat-template", tmp_path / "chat.jinja", "--name", "mine"] if template == "given" else []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run("serve", folder, "--device", "cpu", "--port", port, *words) == 0
    expected = {"none": None, "saved with the tokenizer": "{{ messages }}", "given": "{{ bos_token }}{{ messages }}"}
    assert served["name"] == ("mine" if template == "given" else str(folder))
    assert served["template"] == expected[template]
    assert (served["host"], served["port"], served["cors"]) == ("localhost", port, False)
    assert served["generation"].do_sample and served["generation"].eos_token_id == served["end"] is not None
