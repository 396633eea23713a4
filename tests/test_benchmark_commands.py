"""The commands of the benchmarks: judging results, writing them in time, and resuming in another process."""

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the benchmarks are not part of this copy")


@pytest.fixture
def load(monkeypatch):
    """Import a file of the folder by name, as a command started there does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


DECODE = ["--device", "cpu", "--dtype", "float32", "--pass", "decode", "--keys", "64", "--quick"]


def spoil(cases, monkeypatch, name, change):
    """The function of `cases` that makes a contender gives another result."""
    make = getattr(cases, name)

    def spoilt(*arguments, **options):
        forward = make(*arguments, **options)
        return lambda: change(forward())

    monkeypatch.setattr(cases, name, spoilt)


@pytest.mark.parametrize("change", [lambda out: out + 0.01, lambda out: out * torch.nan])
def test_a_peer_that_differs_is_a_note(load, tmp_path, monkeypatch, change):
    spoil(load("cases"), monkeypatch, "sdpa", change)
    path = tmp_path / "attn.json"
    load("attn").main([*DECODE, "--json", str(path)])
    data = json.loads(path.read_text())
    names = {row["backend"] for row in data["rows"]}
    assert {"andromeda", "andromeda, no windows", "sdpa, no bias"} <= names  # the last computes something else
    assert "sdpa, bias tensor" not in names
    assert any(note.startswith("sdpa, bias tensor, decode b1 n64") and "not timed" in note for note in data["notes"])


def test_kernels_of_ours_that_differ_end_with_an_error_after_all_is_written(load, tmp_path, monkeypatch):
    """Both rows of this library are wrong in the same way; without a judge, the others would be considered wrong."""
    spoil(load("cases"), monkeypatch, "andromeda", lambda out: out + 0.01)
    path = tmp_path / "attn.json"
    with pytest.raises(SystemExit, match=r"andromeda, decode .* differs by 0.01 from plain torch: not timed"):
        load("attn").main([*DECODE, "--json", str(path)])
    assert "sdpa, bias tensor" in {row["backend"] for row in json.loads(path.read_text())["rows"]}


def test_an_error_between_the_rows_that_are_judged_is_seen(load, monkeypatch):
    cases = load("cases")
    inputs = cases.AttentionInputs(cases.AttentionCase("forward", 500, num_heads=2, alibi_heads=1))
    judge = load("checks").Judge(inputs)
    out = cases.andromeda(inputs, windows=False)()
    assert judge.objection("first", out) is None
    assert 1 not in judge.rows
    out = out.clone()
    out[:, 1] += 1
    assert judge.objection("second", out) == "differs by 1 from first"


def test_every_case_is_written_when_it_ends(load, tmp_path, monkeypatch):
    attn = load("attn")
    path, run, seen = tmp_path / "attn.json", attn.run, []

    def watched(case, args):
        if path.exists():
            data = json.loads(path.read_text())
            seen.append((data["unfinished"], {row["shape"] for row in data["rows"]}))
        return run(case, args)

    monkeypatch.setattr(attn, "run", watched)
    attn.main([*DECODE, "--keys", "32", "64", "--contenders", "andromeda", "--json", str(path)])
    assert seen == [(True, {"b1 n32 h24/1 d128"})]
    data = json.loads(path.read_text())
    assert "unfinished" not in data
    assert {row["backend"] for row in data["rows"] if row["op"] == "attention"} == {
        "andromeda",
        "andromeda, no windows",
    }
    begin, end = data["rows"][0]["measured_at"]
    assert 0 <= end - begin < 60


@pytest.fixture
def grid(load, monkeypatch):
    """attn_grid.py with three short lines; the fixture's list has what ran."""
    module, ran = load("attn_grid"), []
    monkeypatch.setattr(module, "GRID", [f"--pass decode --keys {keys}" for keys in (2048, 4096, 8192)])

    def run(case, args, memory):
        ran.append(case.seqlen)
        if case.seqlen == 64:
            raise RuntimeError("an illegal memory access was encountered")
        return [{"op": "attention", "shape": case.shape, "median_ms": 1.0}], []

    monkeypatch.setattr(module.attn, "run", run)
    return module, ran


def test_a_case_that_fails_leaves_the_others(grid, tmp_path, capsys):
    module, ran = grid
    with pytest.raises(SystemExit, match=r"andromeda did not run decode b1 n64 .*illegal memory access"):
        module.main(["--device", "cpu", "--quick", "--json", str(tmp_path / "grid.json")])
    assert ran == [32, 64, 128]
    data = json.loads((tmp_path / "grid.json").read_text())
    assert [row["shape"][:7] for row in data["rows"]] == ["b1 n32 ", "b1 n128"]
    assert "unfinished" not in data


def test_another_process_goes_on_where_one_was_spoilt(grid, tmp_path, monkeypatch):
    module, ran = grid
    arguments = ["--device", "cpu", "--quick", "--resume", "--json", str(tmp_path / "grid.json")]
    monkeypatch.setattr(module.checks, "is_spoilt", lambda device: ran[-1] == 64)
    with pytest.raises(SystemExit) as end:
        module.main(arguments)
    assert end.value.code == module.SPOILT
    assert json.loads((tmp_path / "grid.json").read_text())["unfinished"] is True
    with pytest.raises(SystemExit, match="illegal memory access"):
        module.main(arguments)
    assert ran == [32, 64, 128]
    data = json.loads((tmp_path / "grid.json").read_text())
    assert len(data["rows"]) == 2
    assert sum("the process ended at decode b1 n64 h24/1 d128" in note for note in data["notes"]) == 1


def test_a_case_that_ends_the_process_is_named(grid, tmp_path, monkeypatch):
    module, ran = grid
    arguments = ["--device", "cpu", "--quick", "--resume", "--json", str(tmp_path / "grid.json")]
    run = module.attn.run

    def die(case, args, memory):
        if case.seqlen == 64:
            raise KeyboardInterrupt  # stands for a signal: nothing more is written
        return run(case, args, memory)

    monkeypatch.setattr(module.attn, "run", die)
    with pytest.raises(KeyboardInterrupt):
        module.main(arguments)
    data = json.loads((tmp_path / "grid.json").read_text())
    assert [row["shape"][:7] for row in data["rows"]] == ["b1 n32 "]
    monkeypatch.setattr(module.attn, "run", run)
    with pytest.raises(SystemExit, match="the process ended at decode b1 n64"):
        module.main(arguments)
    assert ran == [32, 128]


def test_other_processes_compile_all_lines_of_the_grid(load, monkeypatch):
    """On a GPU, once: not where another process goes on."""
    module = load("attn_grid")
    started = []

    class Process:
        def __init__(self, command):
            started.append(command)

        def wait(self):
            pass

    monkeypatch.setattr(module.subprocess, "Popen", Process)
    module.compile_all()
    prepared = []
    monkeypatch.setattr(module.attn, "prepare", lambda case, args: prepared.append((str(case), args.contenders)))
    for _, path, *words in started:
        assert path == module.__file__
        module.main(["--device", "cpu", *words[2:]])
    args = module.parse(["--device", "cpu"])
    cases = [case for line in module.GRID for case in module.attn.all_cases(module.arguments_of(line, args))]
    assert sorted(prepared) == sorted((str(case), ["andromeda, triton"]) for case in cases)


def test_lines_of_the_grid_are_arguments_of_attn(load):
    module = load("attn_grid")
    args = module.parse(["--device", "cpu"])
    shapes = [case.shape for line in module.GRID for case in load("attn").all_cases(module.arguments_of(line, args))]
    assert shapes[:3] == ["b1 n8192 h24/1 d128", "b1 n8192 h24/1 d128", "b1 n131072 h24/1 d128"]
    assert {"b1 n8192 h24/1 d64", "b1 n8192 h16/16 d128", "b64 n2048 h24/1 d128"} <= set(shapes)
    with pytest.raises(SystemExit):
        module.parse(["--device", "cpu", "--resume"])


def test_model_without_its_peer(load, tmp_path, monkeypatch):
    model = load("model")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "x_transformers" else find_spec(name, *more)
    )
    small = ["--dim", "32", "--depth", "1", "--heads", "2", "--dim-head", "16", "--seqlen", "16", "--quick"]
    steps = ["--pass", "forward", "training", "generation", "--dtype", "bfloat16"]
    model.main(["--device", "cpu", *small, *steps, "--profile", "--json", str(tmp_path / "model.json")])
    data = json.loads((tmp_path / "model.json").read_text())
    assert [(row["pass"], row["backend"]) for row in data["rows"]] == [
        ("forward", "andromeda"),
        ("training", "andromeda"),
        ("training", "andromeda, logits kept"),
        ("generation", "andromeda"),
    ]
    for row in data["rows"][1:3]:
        found = row["profile"]
        assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-2)
        assert {"matrix products", "attention", "optimizer"} <= set(found["shares"])
        assert 0 < len(found["longest"]) <= load("profiles").KEPT
        assert any(note.startswith(f"training, 16 tokens, {row['backend']}: ") for note in data["notes"])
    row = data["rows"][-1]
    assert row["tokens_per_s"] == pytest.approx(4 / row["median_ms"] * 1e3)
    assert "x-transformers is not installed" in data["notes"][0]


def test_a_model_that_keeps_its_logits_has_the_same_loss_and_gradients(load):
    model = load("model")
    shape = ["--dim", "32", "--depth", "2", "--heads", "2", "--dim-head", "16", "--quick", "--device", "cpu"]
    ours, _ = model.build_pair(model.parse(shape), 24)
    kept = model.with_logits_kept(ours)
    tokens = torch.randint(256, (2, 25))
    losses = [ours(tokens, return_loss=True), model.loss_of_logits(kept, tokens)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    pairs = list(zip(ours.parameters(), kept.parameters(), strict=True))
    assert all(own is not other for own, other in pairs)
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("peak, speed, verdicts", [(24.0, 1.0, ["met", "met"]), (26.0, 0.9, ["missed", "missed"])])
def test_bars_of_a_training_step(load, peak, speed, verdicts):
    report, timing, bars, kept = load("report"), load("timing"), load("bars"), load("model").KEPT

    def row(backend, milliseconds, memory):
        return report.make_row(
            timing.Timing([milliseconds]), op="model", step="training", shape=bars.TRAINING_SHAPE, dtype="float32",
            device="cpu", backend=backend, peak_memory_mb=memory,
        )  # fmt: skip

    rows = [row("andromeda", 1 / speed, peak), row(kept, 1.0, 100.0)]
    lines = bars.evaluate_training(rows, kept)
    assert [line["verdict"] for line in lines] == verdicts
    assert lines[0]["measured"] == pytest.approx(peak / 100)
    assert bars.evaluate_training([{**row, "shape": "s"} for row in rows], kept) is None
    assert bars.evaluate_training(rows[:1], kept) is None


def test_parts_of_a_training_step(load):
    """Names that torch's profiler gives to kernels of a GPU, and to operators on a CPU."""
    part_of = load("profiles").part_of
    assert part_of("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT") == "matrix products"
    assert part_of("aten::addmm") == "matrix products"
    assert part_of("void andromeda::cuda::attention_backward_dq_kernel<128, true>(Params)") == "attention"
    assert part_of("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>") == "feed-forward"
    assert part_of("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>") == "other"
    assert part_of("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>") == "optimizer"
    assert part_of("Memcpy DtoD (Device -> Device)") == "casts and copies"


def test_generation_without_its_peer(load, tmp_path, monkeypatch):
    decode, model = load("decode"), load("model")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "x_transformers" else find_spec(name, *more)
    )
    small = ["--device", "cpu", "--dim", "32", "--depth", "1", "--heads", "2", "--dim-head", "16", "--quick"]
    decode.main([*small, "--context", "8", "--json", str(tmp_path / "decode.json")])
    data = json.loads((tmp_path / "decode.json").read_text())
    assert [row["backend"] for row in data["rows"]] == ["andromeda, cached step", "andromeda, recomputed"]
    args = decode.parse(small)
    ours, _ = model.build_pair(args, 40)
    seen = []
    generate = ours.generate

    def noted(tokens, count, **options):
        seen.append((count, options["cuda_graph"]))
        return generate(tokens, count, **options)

    monkeypatch.setattr(ours, "generate", noted)
    monkeypatch.setattr(decode.torch.cuda, "synchronize", lambda: None)
    found = decode.steps(ours.eval(), torch.zeros(1, 8, dtype=torch.int64), args)
    assert seen == [(20, True), (20, False)] * args.rounds
    assert all(len(measured.samples_ms) == args.rounds for measured in found.values())
    assert all(0 < sample < 1000 for measured in found.values() for sample in measured.samples_ms)


def test_autocast_is_entered_for_each_call(load):
    """A single autocast around all training steps would keep the weights that it rounded for the first step."""
    model = load("model")
    weight, x = torch.nn.Parameter(torch.ones(4, 4)), torch.ones(1, 4)
    call = model.rounded(lambda: x @ weight, model.parse(["--device", "cpu", "--dtype", "bfloat16"]))
    before = call()
    with torch.no_grad():
        weight += 1
    assert before.dtype == torch.bfloat16
    assert not torch.equal(before, call())


def test_flops_of_the_model_are_those_that_torch_counts(load):
    from torch.utils.flop_counter import FlopCounterMode

    model = load("model")
    shape = ["--dim", "64", "--depth", "2", "--heads", "2", "--dim-head", "32", "--quick", "--device", "cpu"]
    ours, _ = model.build_pair(model.parse(shape), 128)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(torch.zeros(1, 128, dtype=torch.int64))
    counted = model.flops_per_token(ours, 128) * 128
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.03)  # norms, rotation, the diagonal


SCALING = ["--device", "cpu", "--seqlen", "128", "256", "512", "--quick"]


def curves(path):
    """The lengths at which each contender was measured."""
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        found.setdefault(row["backend"], []).append(row["seqlen"])
    return found


@pytest.mark.parametrize("when", ["built", "called", "timed"])
def test_a_curve_ends_where_memory_does_and_the_others_go_on(load, monkeypatch, tmp_path, when):
    scaling, cases = load("scaling"), load("cases")
    make, calls = cases.sdpa, []

    def sdpa(inputs, **options):
        forward = make(inputs, **options)
        if inputs.case.seqlen < 256:
            return forward
        if when == "built":
            raise MemoryError("no room")

        def fail():
            calls.append(1)
            if when == "called" or len(calls) > 2:  # the first two calls are compared and watched
                raise MemoryError("no room")
            return forward()

        return fail

    monkeypatch.setattr(cases, "sdpa", sdpa)
    path = tmp_path / "scaling.json"
    scaling.main([*SCALING, "--json", str(path)])
    assert curves(path) == {"andromeda": [128, 256, 512], "sdpa, bias tensor": [128]}
    data = json.loads(path.read_text())
    assert "unfinished" not in data
    assert [note for note in data["notes"] if "ends before" in note] == [
        "sdpa, bias tensor ends before 256 tokens: MemoryError: no room."
    ]
    row = data["rows"][1]
    assert row["backend"] == "sdpa, bias tensor"
    assert row["peak_memory_mb"] >= row["held_mb"]


def test_a_curve_ends_before_it_takes_too_long_or_all_memory(load, tmp_path, monkeypatch):
    scaling = load("scaling")
    path = tmp_path / "scaling.json"
    scaling.main([*SCALING, "--limit", "1e-9", "--json", str(path)])
    assert curves(path) == {"andromeda": [128], "sdpa, bias tensor": [128]}
    monkeypatch.setattr(scaling, "available_mb", lambda: 0.0)
    case = load("cases").AttentionCase("backward", 256)
    args = scaling.parse(["--device", "cpu"])
    last = {"seqlen": 128, "median_ms": 1.0, "peak_memory_mb": 1024.0}
    assert scaling.expected_trouble(case, last, args) == "a pass would need about 4 GiB"
    assert scaling.expected_trouble(case, None, args) is None
    assert scaling.expected_trouble(case, {**last, "median_ms": 2e4}, args) == "a pass would take about 80 s"


def test_kernels_of_ours_that_differ_end_the_curve_with_an_error(load, tmp_path, monkeypatch):
    spoil(load("cases"), monkeypatch, "andromeda", lambda out: out + 0.01)
    with pytest.raises(SystemExit, match=r"andromeda ends before 128 tokens: differs by 0.01 from plain torch"):
        load("scaling").main(["--device", "cpu", "--seqlen", "128", "--quick"])


def test_another_process_goes_on_with_the_lengths_that_are_left(load, tmp_path, monkeypatch):
    """After an error of the GPU a process is unusable: its results are written, and a new one starts with --resume."""
    scaling = load("scaling")
    path, started = tmp_path / "scaling.json", []
    monkeypatch.setattr(scaling.checks, "is_spoilt", lambda device: path.exists() and not started)
    monkeypatch.setattr(scaling.os, "execv", lambda program, words: started.append(words))
    arguments = ["--device", "cpu", "--seqlen", "128", "--quick", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["scaling.py", *arguments])
    monkeypatch.setattr(scaling.report, "finish", lambda *args, **options: None)
    scaling.main(arguments)
    assert started[0][2:] == [*arguments, "--resume"]
    assert json.loads(path.read_text())["unfinished"] is True
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(FOLDER))
    scaling.main(["--device", "cpu", "--seqlen", "128", "256", "--quick", "--json", str(path), "--resume"])
    assert curves(path) == {"andromeda": [128, 256], "sdpa, bias tensor": [128, 256]}


def test_only_the_contender_that_spoils_a_process_is_blamed(load, monkeypatch, tmp_path):
    scaling, cases = load("scaling"), load("cases")
    spoilt = []

    def sdpa(inputs, **options):
        spoilt.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(cases, "sdpa", sdpa)
    monkeypatch.setattr(scaling.checks, "is_spoilt", lambda device: bool(spoilt))
    monkeypatch.setattr(scaling, "contenders", lambda case, args: cases.contenders(case, compiled=False)[::-1])
    args = scaling.parse(["--device", "cpu", "--quick"])
    record = scaling.Record(args)
    case = cases.AttentionCase("backward", 128)
    assert scaling.measure(case, args, record) == []
    assert record.ended == ["sdpa, no bias"]
    assert "illegal memory access" in record.notes[-1]


def test_a_length_that_a_late_error_spoils_is_a_note(load, monkeypatch):
    scaling, cases = load("scaling"), load("cases")

    def fail(*args, **options):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(scaling.timing, "measure", fail)
    args = scaling.parse(["--device", "cpu", "--quick"])
    record = scaling.Record(args)
    assert scaling.measure(cases.AttentionCase("backward", 64), args, record) == []
    assert record.ended == []
    assert record.notes[-1].startswith("b1 n64 h24/1 d128 was not timed: RuntimeError: an illegal memory access")
