"""`andromeda serve` answers the requests of the real client of OpenAI, in a process of its own."""

import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import openai
import pytest
import torch
import uvicorn
from starlette.testclient import TestClient

from andromeda import Andromeda, AndromedaTokenizer
from andromeda.cli.main import main
from andromeda.huggingface import AndromedaForCausalLM

TEXTS = ["def add(a, b):\n    return a + b\n", "for name in names:\n    print(name)\n", "naïve café ☕"] * 40
SIZES = {"num_tokens": 384, "max_seq_len": 64, "dim": 32, "depth": 2, "dim_head": 16, "heads": 2, "alibi_num_heads": 1}
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"
SECONDS = 120  # for the start of a process on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    torch.manual_seed(0)
    AndromedaForCausalLM.from_andromeda(Andromeda(**SIZES)).save_pretrained(folder)
    AndromedaTokenizer.train(TEXTS, 300).save(folder)
    (folder.parent / "chat.jinja").write_text(TEMPLATE)
    return folder


class Server:
    """The command in a process, until it answers."""

    def __init__(self, *words):
        with socket.create_server(("localhost", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "andromeda", "serve", *map(str, words), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()
        self.client = openai.OpenAI(base_url=f"http://localhost:{self.port}/v1", api_key="none", max_retries=0)
        end = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://localhost:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise AssertionError("".join(self.lines))

    def stop(self, number=signal.SIGINT):
        """The exit code and the messages."""
        self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        self.reader.join(SECONDS)
        return code, "".join(self.lines)


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder, "--name", "tiny", "--chat-template", folder.parent / "chat.jinja")
    yield server
    if server.process.poll() is None:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def loaded(folder):
    model = AndromedaForCausalLM.from_pretrained(folder).eval()
    tokenizer = AndromedaTokenizer(folder, eos_token=None, pad_token=None).tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def greedy(loaded, text, tokens):
    model, tokenizer = loaded
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def whole(text):
    """Without a last character whose bytes have not all been generated: a stream waits for them."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_completion_is_the_greedy_text_of_the_model(server, loaded):
    answer = server.client.completions.create(model="tiny", prompt="def add(", max_tokens=12, temperature=0)
    assert answer.model == "tiny" and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].text == greedy(loaded, "def add(", 12)


def test_a_stream_is_the_same_text(server, loaded):
    parts = server.client.completions.create(model="tiny", prompt="for ", max_tokens=12, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole(greedy(loaded, "for ", 12))


def test_chat_and_its_stream_use_the_template(server, loaded):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "print"}]
    expected = greedy(loaded, "<system>be brief\n<user>print\n<assistant>", 10)
    options = {"model": "tiny", "messages": messages, "max_tokens": 10, "temperature": 0}
    answer = server.client.chat.completions.create(**options)
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content == expected
    parts = list(server.client.chat.completions.create(**options, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole(expected)
    assert parts[-1].choices[0].finish_reason == "length"


def test_the_list_of_models_is_the_served_one(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]


def test_two_requests_at_once(server, loaded):
    texts = {}

    def ask(prompt):
        answer = server.client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
        texts[prompt] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("def ", "for name")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert texts == {prompt: greedy(loaded, prompt, 20) for prompt in ("def ", "for name")}


def test_temperature_and_seed_count(server):
    def sample(**options):
        answer = server.client.completions.create(model="tiny", prompt="def ", max_tokens=20, **options)
        return answer.choices[0].text

    assert sample(temperature=1, seed=1) == sample(temperature=1, seed=1)
    assert len({sample(temperature=1, seed=seed) for seed in range(3)}) > 1


def test_stop_strings(server, loaded):
    text = greedy(loaded, "def add(", 30)
    stop = text[4:6]
    answer = server.client.completions.create(model="tiny", prompt="def add(", max_tokens=30, temperature=0, stop=stop)
    assert stop in answer.choices[0].text and len(answer.choices[0].text) < len(text)
    assert answer.choices[0].finish_reason == "stop"


def test_impossible_requests_are_refused_with_a_reason(server):
    with pytest.raises(openai.BadRequestError, match="pinned to 'tiny'; requested 'other'"):
        server.client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.client.completions.create(model="tiny", prompt="x", temperature=-1)


def test_ctrl_c_ends_the_server_cleanly_while_it_answers(server):
    parts = server.client.completions.create(model="tiny", prompt="def ", max_tokens=10**6, temperature=0, stream=True)
    next(iter(parts))
    code, said = server.stop()
    assert code == 130 and "Traceback" not in said
    assert said.endswith("andromeda: interrupted\n") and "serving 'tiny' on http://localhost:" in said


@pytest.fixture
def app(folder, monkeypatch):
    """The application that the command would serve for a tokenizer without a chat template."""
    built = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: built.append(self.config.app))
    assert main(["serve", str(folder), "--device", "cpu"]) == 0
    (app,) = built
    return app


def test_a_tokenizer_without_a_template_refuses_chats_and_completes(app, folder, loaded):
    with TestClient(app) as client:
        (entry,) = client.get("/v1/models").json()["data"]
        assert entry["id"] == str(folder)
        chat = {"model": entry["id"], "messages": [{"role": "user", "content": "x"}]}
        answer = client.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 400
        assert "no chat template: send the text to /v1/completions" in answer.json()["error"]["message"]
        request = {"model": entry["id"], "prompt": "x", "max_tokens": 3, "temperature": 0}
        assert client.post("/v1/completions", json=request).json()["choices"][0]["text"] == greedy(loaded, "x", 3)
