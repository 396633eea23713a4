"""The benchmarks' computations on samples: calls per sample, ratios round by round, rows, bars."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the benchmarks are not part of this copy")


@pytest.fixture
def load(monkeypatch):
    """Import a file of the folder by name, as a command started there does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_every_function_follows_every_other_one_in_turn(load, monkeypatch):
    timing = load("timing")
    monkeypatch.setattr(timing, "MIN_SAMPLE_MS", 0.0)  # one call per sample
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = timing.measure(functions, device="cpu", rounds=4, budget_s=60)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert all(len(measured.samples_ms) == 4 for measured in timings.values())


def test_short_calls_share_a_sample(load, monkeypatch):
    timing = load("timing")
    now, calls = [0.0], {"first call slow": 0, "long": 0, "very long": 0}

    def call(name, seconds):
        calls[name] += 1
        now[0] += 0.5 if calls[name] == 1 and name == "first call slow" else seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0], time=lambda: 1000.0 + now[0]))
    functions = {
        "first call slow": lambda: call("first call slow", 0.003),
        "long": lambda: call("long", 0.025),
        "very long": lambda: call("very long", 2.0),
    }
    timings = timing.measure(functions, device="cpu", rounds=3, budget_s=60)
    assert calls == {"first call slow": 2 + 3 * 7, "long": 2 + 3, "very long": 1 + 3}  # warm-up and three samples
    assert timings["first call slow"].samples_ms == pytest.approx([3.0] * 3)  # of a call, not of a sample
    assert timings["long"].samples_ms == pytest.approx([25.0] * 3)
    spent = 0.003 * 21 + 0.025 * 3 + 2.0 * 3
    assert all(measured.interval[1] - measured.interval[0] == pytest.approx(spent) for measured in timings.values())

    timings = timing.measure(functions, device="cpu", rounds=50, budget_s=0.0)
    assert [len(measured.samples_ms) for measured in timings.values()] == [2, 2, 2]  # the minimum number of rounds


def test_ratios_pair_the_rounds(load):
    timing = load("timing")
    slow, fast = timing.Timing([4.0, 40.0, 9.0]), timing.Timing([2.0, 20.0, 3.0])
    assert timing.paired_ratio(slow, fast) == (2.0, 2.0, 3.0)
    assert timing.paired_ratio(slow, fast, 0.5) == (1.0, 1.0, 1.5)
    with pytest.raises(ValueError):
        timing.paired_ratio(slow, timing.Timing([1.0]))


def test_peak_memory_counts_what_a_call_frees_again(load):
    timing = load("timing")

    def function():
        torch.ones(64 << 20, dtype=torch.uint8)

    peak = timing.peak_memory_mb(function, "cpu")
    if peak is None:
        pytest.skip("this system does not tell the high-water mark of the memory")
    assert 60 < peak < 100
    measured, peak = timing.measure_once(function, "cpu")
    assert 60 < peak < 100
    assert len(measured.samples_ms) == 1


def make_row(load, backend, samples, *, step="forward", shape="b1 n2048 h24/1 d128", dtype="float32", **more):
    return load("report").make_row(
        load("timing").Timing(samples),
        op="attention",
        step=step,
        shape=shape,
        dtype=dtype,
        device="cpu",
        backend=backend,
        **more,
    )


def test_row(load):
    row = make_row(
        load, "a", [2.0, 1.0, 4.0], flops=2e9, bytes_moved=4e6, tokens=10, spreads={"ratio": (2.0, 1.5, 3.0)}, more=1
    )
    assert row["median_ms"] == 2.0
    assert (row["tflops"], row["gbps"], row["tokens_per_s"]) == pytest.approx((1.0, 2.0, 5000.0))
    assert (row["ratio"], row["ratio_range"], row["more"]) == (2.0, [1.5, 3.0], 1)
    assert row["samples_ms"] == [2.0, 1.0, 4.0]
    assert make_row(load, "a", [1.0])["ratio"] is None


def test_json_carries_the_bars(load, tmp_path):
    report = load("report")
    path = tmp_path / "r.json"
    report.write_json(path, [make_row(load, "a", [1.0])], {"commit": "c"}, ["note"], {"bars": [{"verdict": "met"}]})
    data = json.loads(path.read_text())
    assert (data["notes"], data["bars"], data["rows"][0]["commit"]) == (["note"], [{"verdict": "met"}], "c")


def only(load, rows, **bar):
    """The line of one bar."""
    bars = load("bars")
    fields = {"step": "forward", "dtype": "float32", "seqlen": 2048, "backend": bars.NO_WINDOWS, "at_least": 2.0}
    [line] = bars.evaluate(rows, (bars.Bar(**{**fields, **bar}),))
    return line


@pytest.mark.parametrize("at_least, verdict", [(2.0, "met"), (2.01, "missed")])
def test_bar_against_a_contender(load, at_least, verdict):
    rows = [make_row(load, "andromeda, no windows", [1.0, 2.0, 1.0]), make_row(load, "flex_attention", [2.0, 4.0, 5.0])]
    line = only(load, rows, against="flex_attention", at_least=at_least)
    assert (line["measured"], line["rounds"], line["verdict"]) == (2.0, [2.0, 5.0], verdict)


def test_bar_against_the_machine(load):
    bars = load("bars")
    spread = {"of_copy": (0.9, 0.7, 1.0)}
    row = make_row(load, bars.WINDOWS, [1.0], step="decode", shape="b1 n8192 h24/1 d128", spreads=spread)
    line = only(load, [row], step="decode", seqlen=8192, backend=bars.WINDOWS, against=bars.COPY, at_least=0.8)
    assert (line["measured"], line["rounds"], line["verdict"]) == (0.9, [0.7, 1.0], "met")


def test_bar_of_bfloat16_against_float32_takes_the_widest_spread(load):
    bars = load("bars")
    rows = [
        make_row(load, bars.NO_WINDOWS, [1.0], spreads={"of_matmul": (0.8, 0.5, 1.0)}),
        make_row(load, bars.NO_WINDOWS, [1.0], dtype="bfloat16", spreads={"of_matmul": (1.6, 1.5, 2.0)}),
    ]
    line = only(load, rows, dtype="bfloat16", against=bars.FLOAT32, at_least=1.9)
    assert (line["measured"], line["rounds"], line["verdict"]) == (2.0, [1.5, 4.0], "met")
    assert only(load, rows[1:], dtype="bfloat16", against=bars.FLOAT32)["verdict"] == "not measured"


def test_bars_without_rows(load):
    lines = load("bars").evaluate([make_row(load, "andromeda", [1.0], shape="b2 n2048 h24/1 d128")])
    assert {line["verdict"] for line in lines} == {"not measured"}
    assert len({(line["what"], line["bar"]) for line in lines}) == len(lines)


def test_bars_name_rows_that_exist(load):
    """A misspelt contender would remain "not measured" forever."""
    bars, cases = load("bars"), load("cases")
    for device, known in (("cpu", bars.BARS), ("cuda", bars.HOPPER_BARS)):
        for bar in known:
            case = cases.AttentionCase(bar.step, bar.seqlen, dtype=getattr(torch, bar.dtype), device=device)
            names = {contender.name for contender in cases.contenders(case)}
            assert {bar.backend, bar.against} <= names | {bars.MATMUL, bars.COPY, bars.FLOAT32, bars.TFLOPS}


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        ("cpu", {}, ["andromeda", "andromeda, no windows"]),
        ("cuda", {}, ["andromeda", "andromeda, no windows", "andromeda, triton", "andromeda, triton, no windows"]),
        ("cuda", {"head_dim": 256}, ["andromeda, triton", "andromeda, triton, no windows"]),
        ("cuda", {"dtype": torch.float32}, ["andromeda, triton", "andromeda, triton, no windows"]),
    ],
)
def test_kernels_of_attention_on_a_device(load, device, changes, expected):
    cases = load("cases")
    found = cases.contenders(
        cases.AttentionCase("forward", 64, **{"dtype": torch.bfloat16, "device": device, **changes})
    )
    assert [contender.name for contender in found if contender.name.startswith("andromeda")] == expected
    assert next(contender.name for contender in found if contender.windowed) == expected[0]


def test_a_refusal_of_triton_is_a_fact_about_the_machine(load):
    checks = load("checks")
    refused = NotImplementedError("attention: backend 'triton' does not support this call\n    triton: not installed")
    note = checks.absence("andromeda, triton, no windows", "forward b1", refused, [])
    assert note == "No row `andromeda, triton, no windows` for forward b1: triton: not installed"
    checks.exit_if_missing([note])
    for name, error in (("andromeda, triton", RuntimeError("no")), ("andromeda", refused)):
        note = checks.absence(name, "forward b1", error, [])
        with pytest.raises(SystemExit, match=f"{name} did not run forward b1"):
            checks.exit_if_missing([note])


def test_bar_on_a_rate(load):
    bars = load("bars")
    row = make_row(load, bars.NO_WINDOWS, [1.0, 2.0, 4.0], flops=4e9)
    line = only(load, [row], against=bars.TFLOPS, at_least=2.0)
    assert (line["measured"], line["rounds"], line["verdict"]) == (2.0, [1.0, 4.0], "met")
    assert line["bar"] == ">= 2 TFLOP/s"


def test_bars_know_their_gpu(load, monkeypatch):
    bars = load("bars")
    for name, known in (("NVIDIA H200", bars.HOPPER_BARS), ("NVIDIA A100-SXM4-80GB", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert bars.of_device("cuda") == known


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("step", ["forward", "decode"])
def test_effective_work_is_what_the_windows_hold(load, step, causal):
    cases = load("cases")
    case = cases.AttentionCase(step, 300, num_heads=6, alibi_heads=4, causal=causal)
    positions = range(case.seqlen - case.seqlen_q, case.seqlen)
    keys = {p: range(p + 1 if causal else case.seqlen) for p in positions}
    visible = [(head, abs(p - key)) for head in range(6) for p in positions for key in keys[p]]
    inside = [pair for pair in visible if pair[1] < case.windows[pair[0]]]
    assert 0 < len(inside) < len(visible)
    assert case.flops == 2 * 2 * len(visible) * case.head_dim
    assert case.effective_flops / case.flops == pytest.approx(len(inside) / len(visible))


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("step, seqlen", [("forward", 640), ("forward", 700), ("decode", 1000)])
def test_mask_of_blocks_is_that_of_pairs(load, step, seqlen, causal, windows):
    from torch.nn.attention.flex_attention import create_block_mask

    case = load("cases").AttentionCase(step, seqlen, num_heads=6, alibi_heads=5, causal=causal)
    mask = load("cases").block_mask(case, windows=windows)
    heads = case.num_heads if windows else None
    expected = create_block_mask(mask.mask_mod, None, heads, case.seqlen_q, seqlen, device="cpu")
    assert mask.seq_lengths == expected.seq_lengths == (case.seqlen_q, seqlen)

    def blocks(numbers, indices):
        return [
            [sorted(row[:count].tolist()) for row, count in zip(rows, counts, strict=True)]
            for rows, counts in zip(indices[0], numbers[0], strict=True)
        ]

    for kind in ("kv", "full_kv"):
        found, wanted = (
            blocks(getattr(m, f"{kind}_num_blocks"), getattr(m, f"{kind}_indices")) for m in (mask, expected)
        )
        assert found == wanted


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("step", ["forward", "decode"])
def test_exact_rows(load, step, kv_heads, causal):
    """Against the reference, which repeats key heads and builds the bias in another way."""
    from andromeda.reference import attention as reference

    cases = load("cases")
    case = cases.AttentionCase(step, 90, 2, 6, kv_heads, 16, 3, causal=causal)
    inputs = cases.AttentionInputs(case)
    rows, exact = inputs.exact_rows(20)
    assert len(rows) == (20 if step == "forward" else 1)
    assert {0, case.seqlen_q - 1} <= set(rows.tolist())
    options = {"causal": causal, "softmax_scale": cases.LOGIT_SCALE, "alibi_slopes": inputs.slopes.double()}
    expected = reference.attention(*(x.double() for x in (inputs.q, inputs.k, inputs.v)), **options)[0]
    torch.testing.assert_close(exact.double(), expected[:, rows], rtol=0, atol=1e-5)


def test_what_a_contender_says(load):
    describe = load("checks").describe
    reasons = [
        "Flash: no mask. (Triggered internally at a.cpp:7.)",
        "Flash: no mask. (Triggered internally at b.cpp:9.)",
    ]
    assert describe(RuntimeError("No kernel.\nTry another"), reasons) == "RuntimeError: No kernel.; Flash: no mask."
    assert describe(NotImplementedError(), []) == "NotImplementedError: no message"


@pytest.mark.parametrize("used, verdict", [(999.0, "met"), (1000.0, "missed"), (None, "not measured")])
def test_bar_on_memory(load, used, verdict):
    [line] = load("bars").evaluate_long([make_row(load, "andromeda", [1.0], workspace_mb=used)])
    assert (line["measured"], line["verdict"]) == (used, verdict)


@pytest.mark.parametrize(
    "command", ["attn", "decode", "model", "qk_norm_rotary", "token_shift_norm", "linear_cross_entropy", "feed_forward"]
)
def test_a_gpu_that_is_not_there_is_refused(load, command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = load(command)
    with pytest.raises(SystemExit):
        module.parse(["--device", "cuda"])
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert module.parse([]).device == "cpu"


def test_attention_command_prints_and_writes(load, capsys, tmp_path):
    path = tmp_path / "attn.json"
    arguments = ["--device", "cpu", "--dtype", "float32", "--pass", "decode", "--keys", "64", "--quick"]
    load("attn").main([*arguments, "--json", str(path)])
    printed = capsys.readouterr().out
    data = json.loads(path.read_text())
    row = next(row for row in data["rows"] if row["backend"] == "andromeda")
    copy = next(row for row in data["rows"] if row["backend"] == "memory copy")
    assert row["of_copy_range"][0] <= row["of_copy"] <= row["of_copy_range"][1]
    assert copy["gbps"] == pytest.approx(2 * (2 * 64 * 128 * 4) / copy["median_ms"] / 1e6)
    assert "of_matmul" in printed
    assert "not measured" in printed
    assert len(data["bars"]) == len(load("bars").BARS)


def test_peers_may_fail_but_not_the_kernels(load, tmp_path, monkeypatch, capsys):
    attn, cases = load("attn"), load("cases")

    def refuse(*args, **options):
        raise RuntimeError("no kernel for this")

    arguments = ["--device", "cpu", "--dtype", "float32", "--pass", "decode", "--keys", "64", "--quick"]
    monkeypatch.setattr(cases, "sdpa", refuse)
    attn.main(arguments)
    assert "sdpa, no bias did not run decode" in capsys.readouterr().out
    monkeypatch.setattr(cases, "andromeda", refuse)
    with pytest.raises(SystemExit, match=r"andromeda, no windows did not run decode .*: no kernel for this"):
        attn.main([*arguments, "--json", str(tmp_path / "attn.json")])
    assert {row["op"] for row in json.loads((tmp_path / "attn.json").read_text())["rows"]} == {"matmul", "copy"}


@pytest.mark.parametrize(
    ("command", "arguments", "elements"),
    [
        ("qk_norm_rotary", [], {"forward": 2 * 25 * 128, "backward": 3 * 25 * 128}),
        ("token_shift_norm", ["--dim", "40", "--shift", "2"], {"forward": 4 * 40, "backward": 6 * 40}),
    ],
)
def test_memory_bound_commands_print_and_write(load, capsys, tmp_path, command, arguments, elements):
    """elements: moved by one token."""
    path = tmp_path / f"{command}.json"
    load(command).main(["--device", "cpu", "--seqlen", "16", "--quick", "--json", str(path), *arguments])
    assert "of_copy" in capsys.readouterr().out
    data = json.loads(path.read_text())
    assert [(row["pass"], row["op"], row["backend"]) for row in data["rows"]] == [
        (step, op, name)
        for step in ("forward", "backward")
        for op, name in ((command, "andromeda"), (command, "torch"), ("copy", "memory copy"))
    ]
    for row in data["rows"]:
        assert row["gbps"] == pytest.approx(16 * 2 * elements[row["pass"]] / row["median_ms"] / 1e6)
    row = data["rows"][0]
    [line, _] = load("bars").evaluate_copy(data["rows"], 0.85)
    assert (line["measured"], line["verdict"]) == (row["of_copy"], "met" if row["of_copy"] >= 0.85 else "missed")


@pytest.mark.parametrize(
    ("command", "arguments", "products", "others"),
    [
        ("linear_cross_entropy", ["--dim", "8", "--num-tokens", "50"], 2 * 8 * 50, ["andromeda, logits kept"]),
        ("feed_forward", ["--dim", "8"], 2 * 2 * 8 * 32, []),
    ],
)
def test_commands_of_products_print_and_write(load, capsys, tmp_path, command, arguments, products, others):
    """products: operations of the forward pass of one token."""
    path = tmp_path / f"{command}.json"
    load(command).main(["--device", "cpu", "--seqlen", "16", "--quick", "--json", str(path), *arguments])
    assert "of_matmul" in capsys.readouterr().out
    data = json.loads(path.read_text())
    matmul = load("bars").MATMUL
    assert [(row["pass"], row["backend"]) for row in data["rows"]] == [
        (step, name) for step in ("forward", "training") for name in ("andromeda", *others, "torch", matmul)
    ]
    for row in data["rows"]:
        if row["op"] == command:
            work = 16 * products * (3 if row["pass"] == "training" else 1)
            assert row["tflops"] == pytest.approx(work / row["median_ms"] / 1e9)
            assert row["workspace_mb"] <= row["peak_memory_mb"]
        else:
            assert (row["op"], row["tflops"]) == ("matmul", pytest.approx(2 * 2048**3 / row["median_ms"] / 1e9))


def test_other_packages_have_rows_where_they_are_installed(load, monkeypatch, tmp_path):
    """A package that works and one that does not run here."""
    benchmark = load("linear_cross_entropy")
    (tmp_path / "cut_cross_entropy.py").write_text(
        "from torch.nn import functional\n"
        "def linear_cross_entropy(e, c, targets, ignore_index, impl):\n"
        "    return functional.cross_entropy(e @ c.T, targets, ignore_index=ignore_index)\n"
    )
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("raise RuntimeError('no GPU')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "rows.json"
    benchmark.main(["--device", "cpu", "--seqlen", "16", "--quick", "--pass", "training", "--json", str(file)])
    data = json.loads(file.read_text())
    assert "cut_cross_entropy" in {row["backend"] for row in data["rows"]}
    assert "liger did not run training of linear_cross_entropy: RuntimeError: no GPU" in data["notes"]


@pytest.mark.parametrize(
    ("command", "arguments", "op", "moved"),
    [
        ("linear_cross_entropy", ["--num-tokens", "200"], "cross_entropy", {"training": 2 * 200}),
        ("feed_forward", ["--dim", "8"], "gelu", {"forward": 2 * 32, "backward": 4 * 32}),
    ],
)
def test_kernels_between_products_beside_a_copy(load, emulated_triton, command, arguments, op, moved):
    """moved: numbers per token."""
    benchmark, bars = load(command), load("bars")
    args = benchmark.parse(["--device", "cpu", "--seqlen", "4", "--quick", *arguments])
    rows, notes = benchmark.kernel_rows(args)
    assert notes == []
    assert [(row["op"], row["pass"], row["backend"]) for row in rows] == [
        (name, step, backend)
        for step in moved
        for name, backend in ((op, "andromeda, triton"), ("copy", "memory copy"))
    ]
    for row in rows:
        assert row["gbps"] == pytest.approx(4 * 4 * moved[row["pass"]] / row["median_ms"] / 1e6)
    lines = bars.of_copy([{**row, "device": "cuda"} for row in rows])
    assert [line["bar"] for line in lines] == [">= 0.85 x memory copy rate"] * len(moved)


@pytest.mark.parametrize("ratio, used, verdicts", [(1.0, 63.0, ["met"] * 2), (0.9, 64.0, ["missed"] * 2)])
def test_bars_of_the_loss(load, ratio, used, verdicts):
    bars = load("bars")
    spreads = {"ratio": (ratio, ratio, ratio)}
    place = {"step": "training", "shape": bars.LOSS_SHAPE}
    lines = bars.evaluate_loss([make_row(load, "andromeda", [1.0], **place, spreads=spreads, workspace_mb=used)])
    assert [line["verdict"] for line in lines] == verdicts
    assert bars.evaluate_loss([make_row(load, "andromeda", [1.0], workspace_mb=used)]) is None


def test_a_memory_bound_result_that_is_off_is_not_timed(load, monkeypatch, tmp_path):
    """The others are shown, and all measurements are written before the command ends with an error."""
    benchmark = load("token_shift_norm")
    monkeypatch.setattr(benchmark, "token_shift_norm", lambda x, **options: (x, x))
    file = tmp_path / "rows.json"
    with pytest.raises(
        SystemExit, match=r"andromeda, forward of token_shift_norm, is off by .* in result 0: not timed"
    ):
        benchmark.main(["--device", "cpu", "--seqlen", "16", "--dim", "40", "--quick", "--json", str(file)])
    written = json.loads(file.read_text())
    assert {row["backend"] for row in written["rows"] if row["pass"] == "forward"} == {"torch", "memory copy"}
    assert any("is off by" in note for note in written["notes"])
