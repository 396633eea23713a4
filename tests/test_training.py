"""Training, exact continuation, checkpoints that are whole or absent, evaluation."""

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch

from andromeda import Andromeda, AndromedaTokenizer, training
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training import TrainSettings, evaluate, latest_checkpoint, sample_text, token_bytes, train

SIZES = {"num_tokens": 320, "max_seq_len": 16, "dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "alibi_num_heads": 1}
TEXTS = ["def add(a, b):\n    return a + b\n", "for name in names:\n    print(name)\n", "naïve café ☕"] * 40


class Rows(torch.utils.data.Dataset):
    """Rows that count up, with different starts: something a tiny model can learn.

    fail_at: as if killed when so many rows have been read since `begin`.
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
    """Ends a run as a signal that cannot be caught would: nothing after it is executed."""


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


@pytest.fixture(scope="module")
def tokenizer():
    return AndromedaTokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights after 8 steps in one go."""
    model = new_model()
    train(model, Rows(), settings(tmp_path_factory.mktemp("whole")))
    return weights(model)


# ---- what training does


def test_the_loss_falls(tmp_path):
    model = new_model()
    before = evaluate(model, Rows()).loss
    result = train(model, Rows(), settings(tmp_path, steps=30, save_every=0))
    assert result.steps == 30 and result.tokens == 30 * 2 * 12
    assert result.history[0]["loss"] > result.loss
    assert evaluate(model, Rows()).loss < before - 0.5
    assert Path(result.checkpoint).name == "checkpoint-30"
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.mfu is None and result.interrupted is None


def test_the_saved_model_is_the_trained_one(tmp_path, tokenizer):
    model = new_model()
    train(model, Rows(), settings(tmp_path), tokenizer=tokenizer)
    loaded = AndromedaForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(loaded.state_dict(), model.state_dict())
    assert AndromedaTokenizer(str(tmp_path / "model"), eos_token=None, pad_token=None).tokenizer.eos_token == "<eos>"


def test_checkpoints_hold_no_pickle_of_arguments_and_old_ones_go(tmp_path):
    train(new_model(), Rows(), settings(tmp_path, keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-6",
        "checkpoint-8",
        "history.jsonl",
        "model",
    ]
    for folder in tmp_path.iterdir():
        assert not (folder / "training_args.bin").exists()


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    """The mean goes over all tokens of a step: rows with few labels must not weigh more."""

    class Uneven(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            row["labels"][: 1 + index % 11] = -100
            return row

    found = {}
    for size, parts in ((4, 1), (1, 4)):
        model = new_model()
        options = {"batch_size": size, "gradient_accumulation": parts, "steps": 3, "save_every": 0}
        train(model, Uneven(), settings(tmp_path / str(size), **options))
        found[size] = weights(model)
    for name, value in found[4].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-4, rtol=0, msg=name)


def test_weight_decay_leaves_gains_scales_and_biases_alone(tmp_path):
    model = AndromedaForCausalLM.from_andromeda(new_model())
    arguments = settings(tmp_path).training_arguments()
    decayed = training._Trainer(model=model, args=arguments, identity={}, keep=1).get_decay_parameter_names(model)
    others = [name for name, _ in model.named_parameters() if name not in decayed]
    assert {name.rpartition(".")[2] for name in decayed} == {"weight"}
    assert {name.rpartition(".")[2] for name in others} == {"gamma", "residual_scale", "q_scale", "k_scale", "bias"}


def test_worker_processes_change_nothing(tmp_path, uninterrupted):
    model = new_model()
    train(model, Rows(), settings(tmp_path, num_workers=2))
    assert_same(weights(model), uninterrupted)


def test_progress_evaluations_and_samples_are_shown(tmp_path, tokenizer, capsys):
    options = {"eval_every": 4, "sample_every": 4, "sample_prompt": "def "}
    result = train(new_model(), Rows(), settings(tmp_path, **options), eval_dataset=Rows(8), tokenizer=tokenizer)
    shown = capsys.readouterr().err
    assert "step 4/8: loss " in shown and "tokens/s" in shown and "left" in shown
    assert "step 8: evaluation loss" in shown
    assert "step 4: a sample\n  | def " in shown
    assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [4, 8]


# ---- continuing


def test_a_killed_run_continues_bit_for_bit(tmp_path, uninterrupted):
    rows = Rows(fail_at=10)
    with pytest.raises(Killed):
        train(new_model(), rows, settings(tmp_path), on_start=rows.begin)
    assert latest_checkpoint(tmp_path) is not None
    model = new_model()
    result = train(model, Rows(), settings(tmp_path), resume=True)
    assert result.steps == 8 and result.tokens < 8 * 2 * 12
    assert_same(weights(model), uninterrupted)


def test_continuing_across_epochs_with_accumulation(tmp_path):
    """Checkpoints in the middle and at the end of an epoch of 3 steps."""
    options = {"steps": 7, "gradient_accumulation": 2, "save_every": 1, "keep": 9}
    model = new_model()
    train(model, Rows(12), settings(tmp_path / "whole", **options))
    expected = weights(model)
    for step in (2, 3):
        folder = tmp_path / f"from-{step}"
        name = f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / name, folder / name)
        model = new_model()
        train(model, Rows(12), settings(folder, **options), resume=True)
        assert_same(weights(model), expected)


@pytest.mark.parametrize("stage", ["_save_rng_state", "_save_optimizer_and_scheduler", "_install"])
def test_a_run_killed_while_it_writes_a_checkpoint(tmp_path, monkeypatch, uninterrupted, stage):
    """The half-written second checkpoint is not there, the first one is used, and the rest is cleared away."""
    original = getattr(training._Trainer, stage)
    calls = []

    def killed_the_second_time(*arguments):
        calls.append(stage)
        if len(calls) == 2:
            raise Killed
        return original(*arguments)

    replacement = staticmethod(killed_the_second_time) if stage == "_install" else killed_the_second_time
    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, stage, replacement)
        with pytest.raises(Killed):
            train(new_model(), Rows(), settings(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial", "checkpoint-2", "history.jsonl"]
    model = new_model()
    train(model, Rows(), settings(tmp_path), resume=True)
    assert_same(weights(model), uninterrupted)
    assert not (tmp_path / ".partial").exists()


def test_what_a_run_leaves_is_on_the_disk(tmp_path, disk_log):
    train(new_model(), Rows(), settings(tmp_path, keep=9))
    written = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert {path.name for path in written} == {"model", "checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"}
    for path in written:
        disk_log.assert_durable(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "optimizer.pt").write_bytes(b"half"),
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: (folder / training.MANIFEST).unlink(),
    ],
    ids=["truncated file", "missing file", "no manifest"],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, uninterrupted, damage):
    train(new_model(), Rows(), settings(tmp_path, keep=9))
    for step in (6, 8):
        damage(tmp_path / f"checkpoint-{step}")
    assert Path(latest_checkpoint(tmp_path)).name == "checkpoint-4"
    model = new_model()
    train(model, Rows(), settings(tmp_path, keep=9), resume=True)
    assert_same(weights(model), uninterrupted)


def test_nothing_whole_to_continue_from(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"has none\s+checkpoint-7: andromeda_checkpoint.json is missing"):
        train(new_model(), Rows(), settings(tmp_path), resume=True)


def test_a_finished_run_is_not_trained_further(tmp_path, uninterrupted):
    train(new_model(), Rows(), settings(tmp_path))
    shutil.rmtree(tmp_path / "model")  # as if killed between the last checkpoint and the model
    model = new_model()
    result = train(model, Rows(), settings(tmp_path), resume=True)
    assert result.steps == 8 and result.tokens == 0
    assert_same(weights(model), uninterrupted)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_folder_with_checkpoints_is_refused(tmp_path):
    train(new_model(), Rows(), settings(tmp_path))
    with pytest.raises(ValueError, match=r"must not hold checkpoints of another run.*checkpoint-8; resume"):
        train(new_model(), Rows(), settings(tmp_path))


def test_another_run_is_not_continued(tmp_path):
    train(new_model(), Rows(), settings(tmp_path))
    with pytest.raises(
        ValueError, match=r"(?s)these differ:.*learning_rate: was 0.01, is 0.02.*data rows: was 24, is 20"
    ):
        train(new_model(), Rows(20), settings(tmp_path, learning_rate=2e-2), resume=True)
    other = Andromeda(**{**SIZES, "dim": 24})
    with pytest.raises(ValueError, match="model dim: was 16, is 24"):
        train(other, Rows(), settings(tmp_path), resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, uninterrupted, number):
    class Interrupting(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            if self.ids_read == 7:  # a row of the fourth step, which may be loaded ahead
                signal.raise_signal(number)
            return row

    before = signal.getsignal(number)
    rows = Interrupting()
    result = train(new_model(), rows, settings(tmp_path, save_every=0), on_start=rows.begin)
    assert result.interrupted == number.name
    assert 2 <= result.steps <= 4 and _step(result.checkpoint) == result.steps
    assert signal.getsignal(number) is before
    model = new_model()
    train(model, Rows(), settings(tmp_path, save_every=0), resume=True)
    assert_same(weights(model), uninterrupted)


def _step(checkpoint) -> int:
    return json.loads((Path(checkpoint) / training.MANIFEST).read_text())["step"]


# ---- refusals


@pytest.mark.parametrize(
    "options, text",
    [
        ({"steps": 0}, r"steps must be in \[1, 2147483647\], got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"warmup_steps": 9}, r"warmup_steps must be between 0 and steps \(8\), got 9"),
        ({"seed": -1}, r"seed must be in \[0, 4294967295\], got -1"),
        ({"min_learning_rate_ratio": 2.0}, "min_learning_rate_ratio must be in"),
        ({"device": "tpu"}, "device must be None or 'cpu', got 'tpu'"),
        ({"trainer": {"max_step": 3}}, "must name arguments of TrainingArguments, got max_step"),
        ({"trainer": {"max_steps": 3}}, "must not repeat what has a name here, got max_steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        settings(tmp_path, **options).training_arguments()


def test_arguments_of_trainer_pass_through(tmp_path):
    arguments = settings(tmp_path, trainer={"adam_epsilon": 1e-6, "torch_empty_cache_steps": 3}).training_arguments()
    assert arguments.adam_epsilon == 1e-6 and arguments.torch_empty_cache_steps == 3


def test_calls_that_make_no_sense(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="at least the 2 rows of one step, got 1"):
        train(new_model(), Rows(1), settings(tmp_path))
    with pytest.raises(ValueError, match="eval_dataset must be given"):
        train(new_model(), Rows(), settings(tmp_path, eval_every=1))
    with pytest.raises(ValueError, match="tokenizer must be given"):
        train(new_model(), Rows(), settings(tmp_path, sample_every=1))
    small = Andromeda(**{**SIZES, "num_tokens": 299})
    with pytest.raises(ValueError, match=r"at most the 299 ids of the model \(num_tokens\), got 300"):
        train(small, Rows(), settings(tmp_path), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="at most the 299 ids"):
        evaluate(small, Rows(), tokenizer=tokenizer)


# ---- figures


def test_flops_count_matrices_and_visible_scores():
    model = AndromedaForCausalLM.from_andromeda(new_model())
    table = model.transformer.token_emb.weight.numel()
    scores = 1 * 2 * 8 * 100  # layers, heads, head width, sequence
    assert training.training_flops_per_token(model, 100) == 6 * (model.num_parameters() - table + scores)


def test_the_peak_of_a_cpu_is_not_known():
    assert training.peak_flops(torch.device("cpu")) is None


def test_a_sample_disturbs_no_random_numbers(tokenizer):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = sample_text(new_model(), tokenizer, "def ", tokens=8, seed=3)
    torch.manual_seed(0)
    assert sample_text(AndromedaForCausalLM.from_andromeda(_seeded()), tokenizer, "def ", tokens=8, seed=3) == first
    assert torch.equal(torch.rand(3), expected)
    assert first.startswith("def ")


def _seeded():
    with torch.random.fork_rng():
        return new_model()


# ---- evaluation


def test_evaluation_is_the_mean_over_tokens(tokenizer):
    class Uneven(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            row["labels"][2 + index % 10 :] = -100
            return row

    model, rows = new_model(), Uneven(7)
    total, count, size = 0.0, 0, 0
    widths = token_bytes(tokenizer)
    for index in range(7):
        row = rows[index]
        logits = model(row["input_ids"][None]).double()[0, :-1].log_softmax(-1)
        for position, target in enumerate(row["labels"][1:].tolist()):
            if target != -100:
                total -= logits[position, target].item()
                count += 1
                size += widths[target].item()
    found = evaluate(model, rows, tokenizer=tokenizer, batch_size=3)
    assert found.tokens == count and found.bytes == size
    assert found.loss == pytest.approx(total / count, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert evaluate(model, rows).bits_per_byte is None
    assert evaluate(model, rows, max_rows=2).tokens < count


def test_evaluation_without_targets_is_refused():
    class Ignored(Rows):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "labels": torch.full((12,), -100)}

    with pytest.raises(ValueError, match="must have a token to predict"):
        evaluate(new_model(), Ignored())


def test_token_bytes_are_those_of_the_text(tokenizer):
    widths = token_bytes(tokenizer)
    for text in TEXTS[:3]:
        ids = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert widths[ids].sum().item() == len(text.encode())
    assert widths[tokenizer.tokenizer.eos_token_id] == 0


def test_token_bytes_are_unknown_without_a_byte_level_tokenizer():
    from tokenizers import Tokenizer, models

    words = AndromedaTokenizer(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
    assert token_bytes(words) is None


def test_results_are_plain_data(tmp_path):
    result = train(new_model(), Rows(), settings(tmp_path))
    assert json.loads(json.dumps(dataclasses.asdict(result)))["steps"] == 8
