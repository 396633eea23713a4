"""The progress line, the pace, flops and sample texts."""

import math
import types

import torch
from tiny_run import Rows, history, new_model, settings

from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training import peak_flops, progress, sample_text, train, training_flops_per_token
from andromeda.training.progress import Pace
from andromeda.training.trainer import AndromedaTrainer


def test_progress_evaluations_and_samples_are_shown(tmp_path, tokenizer, capsys):
    options = {"eval_every": 4, "sample_every": 4, "sample_prompt": "def "}
    result = train(new_model(), Rows(), settings(tmp_path, **options), eval_dataset=Rows(8), tokenizer=tokenizer)
    shown = capsys.readouterr().err
    assert "step 4/8: loss " in shown and "tokens/s" in shown and "left" in shown
    assert "step 8: evaluation loss" in shown
    assert "step 4: a sample\n  | def " in shown
    assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [4, 8]


def test_an_evaluation_loss_that_is_not_finite_is_said(tmp_path, monkeypatch, capsys):
    original = AndromedaTrainer.evaluation_loop

    def infinite(trainer, *args, **kwargs):
        output = original(trainer, *args, **kwargs)
        output.metrics["eval_loss"] = math.nan
        return output

    monkeypatch.setattr(AndromedaTrainer, "evaluation_loop", infinite)
    train(new_model(), Rows(), settings(tmp_path, eval_every=4), eval_dataset=Rows(8))
    assert "step 4: evaluation loss nan: it is not finite" in capsys.readouterr().err
    assert {"step": 4, "eval_loss": None} in history(tmp_path)


def test_steps_that_take_three_times_as_long_are_noticed_once():
    pace = Pace()
    assert [pace.add(9.0, "cpu") for _ in range(5)] == [None] * 5  # the warm-up
    assert [pace.add(1.0, "cpu") for _ in range(40)] == [None] * 40
    assert [pace.add(2.9, "cpu") for _ in range(40)] == [None] * 40
    said = [pace.add(3.1, "cpu") for _ in range(40)]
    (text,) = filter(None, said)
    assert "3.0 times as long as at the start (3 s, were 1 s)" in text and "OMP_NUM_THREADS=1" in text
    short = Pace()
    assert not any(short.add(seconds, "cpu") for seconds in [1.0] * 30 + [9.0] * 8 + [1.0] * 30), "a passing load"


def test_the_progress_line_says_what_helps_against_slow_steps(tmp_path, monkeypatch, capsys):
    now = [0.0]

    class Clock(Rows):
        def __getitem__(self, index):
            now[0] += 0.1 if self.ids_read < 80 else 0.5
            return super().__getitem__(index)

    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    rows = Clock()
    train(new_model(), rows, settings(tmp_path, steps=75, save_every=0, log_every=80), on_start=rows.begin)
    said = capsys.readouterr().err
    assert said.count("times as long as at the start") == 1 and "OMP_NUM_THREADS=1" in said


def test_flops_count_matrices_and_visible_scores():
    model = AndromedaForCausalLM.from_andromeda(new_model())
    table = model.transformer.token_emb.weight.numel()
    scores = 1 * 2 * 8 * 100  # layers, heads, head width, sequence
    assert training_flops_per_token(model, 100) == 6 * (model.num_parameters() - table + scores)


def test_the_peak_of_a_cpu_is_not_known():
    assert peak_flops(torch.device("cpu")) is None


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
