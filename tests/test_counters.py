"""Counters of ncu, with a stand-in for it: parsing its output and its refusals; predictions and rows."""

import dataclasses
import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the benchmarks are not part of this copy")


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


FORWARD = "void andromeda::cuda::attention_forward_kernel<__nv_bfloat16, 128>(andromeda::AttentionParams, int)"
WIDE = f'''==PROF== Connected to process 4711 (/opt/python3)
==PROF== Profiling "attention_forward_kernel" - 0: 0%....50%....100% - 3 passes
==WARNING== Something about "clocks"
"ID","Process ID","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","gpu__time_duration.sum","sm__cycles_elapsed.max","sm__inst_executed_pipe_tensor_op_hmma.sum","l1tex__data_pipe_lsu_wavefronts_mem_shared.sum","l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum","dram__bytes_read.sum","sm__inst_issued.avg.per_cycle_active"
"","","","","","","","","","ns","cycle","inst","","","byte","inst/cycle"
"0","4711","{FORWARD}","1","7","(128, 1, 1)","(1536, 1, 1)","0","9.0","1,100,000","2,000,000","105,431,040","159,744,000","0","54525952","1.5"
"1","4711","andromeda::cuda::fill_kernel(int)","1","7","(128, 1, 1)","(1, 1, 1)","0","9.0","1000","n/a","0","0","0","12","0.1"
==PROF== Disconnected from process 4711
'''  # noqa: E501
LONG = f'''"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","{FORWARD}","Command line profiler metrics","gpu__time_duration.sum","ns","1,100,000"
"0","{FORWARD}","Command line profiler metrics","dram__bytes_read.sum","byte","54,525,952"
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"1","other","Command line profiler metrics","gpu__time_duration.sum","ns","12"
'''


HOPPER = """"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","void andromeda::cuda::hopper::attention_forward_wgmma_kernel<__half, 128>(andromeda::AttentionParams)","gpu__time_duration.sum","ns","700000"
"""  # noqa: E501


def test_a_line_per_launch(load):
    counters = load("counters")
    first, second = counters.read_csv(WIDE)
    assert first["kernel"] == FORWARD
    assert counters.number(first["gpu__time_duration.sum"]) == 1.1e6
    assert counters.number(second["sm__cycles_elapsed.max"]) is None
    assert counters.read_csv("==ERROR== No kernels were profiled\n") == []


def test_a_line_per_metric(load):
    counters = load("counters")
    first, second = counters.read_csv(LONG)
    assert (first["kernel"], second["kernel"]) == (FORWARD, "other")
    assert [counters.number(first[name]) for name in (counters.TIME, counters.DRAM_READ)] == [1.1e6, 54525952]
    assert counters.number(second[counters.TIME]) == 12


def test_columns(load):
    counters = load("counters")
    first, second = (counters.make_row(launch, 132, 9) for launch in counters.read_csv(WIDE))
    tiles = 24 * sum(2 * (tile + 1) for tile in range(64))
    assert (first["op"], first["pass"], first["shape"]) == ("kernel", "attention_forward", "b1 n8192 h24/1 d128")
    assert first["median_ms"] == 1.1
    assert first["hmma_per_tile"] == pytest.approx(105431040 / tiles) == 1056
    assert first["shared_per_tile"] == pytest.approx(159744000 / tiles) == 1600
    assert first["shared_share"] == pytest.approx(159744000 / 2e6 / 132)
    assert first["hmma_share"] == pytest.approx(105431040 * 6 / 4 / 2e6 / 132)
    assert first["conflicts"] == 0
    assert first["dram_of_least"] == pytest.approx(54525952 / (2 * 8192 * 128 * (24 + 2)))
    assert (second["pass"], second["shared_share"]) == ("fill", None)


def test_columns_of_wgmma(load):
    """Tensor instructions of all warps; slots and clocks of one of the four sub-cores."""
    counters = load("counters")
    (launch,) = counters.read_csv(HOPPER)
    tiles = 24 * sum(tile + 1 for tile in range(64))
    values = {counters.GMMA: 128 * tiles, counters.XU: 512 * tiles, counters.EXECUTED: 4 * 900 * tiles}
    values |= {counters.CYCLES: 3000 * tiles / 132, counters.TENSOR: 68.25, counters.DRAM_READ: 2**20}
    row = counters.make_row(launch | {name: str(value) for name, value in values.items()}, 132, 9)
    assert row["pass"] == "hopper::attention_forward_wgmma"
    assert (row["gmma_per_tile"], row["slots_per_tile"], row["hmma_per_tile"]) == (128, 900, None)
    assert row["tensor_share"] == 0.6825
    assert row["xu_share"] == pytest.approx(1024 / 3000)
    assert row["dram_of_least"] == pytest.approx(2**20 / (2 * 8192 * 128 * (24 + 2)))


@pytest.mark.parametrize("tile", [(128, 64), (64, 64), (128, 128)])
def test_tiles_with_a_visible_pair(load, tile):
    case = load("cases").AttentionCase("forward", 1000, 2, 3)
    queries, keys = tile
    seen = {(p // queries, key // keys) for p in range(1000) for key in range(p + 1)}
    assert load("counters").visible_tiles(case, *tile) == 2 * 3 * len(seen)


# ---- the program ----------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(load, tmp_path, monkeypatch, capsys):
    """Runs counters.py with a stand-in for ncu: Python code that can use `metrics`, `subject` and `log`."""
    counters = load("counters")
    gpu = SimpleNamespace(multi_processor_count=132, major=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(load("report"), "environment", lambda device: {"commit": "c", "gpu": "NVIDIA H200"})

    def run(code):
        ncu = tmp_path / "ncu"
        ncu.write_text(
            f"#!{sys.executable}\nimport sys\nvalue = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
            "metrics, subject = value('--metrics').split(','), value('--subject')\n"
            "log = open(value('--log-file'), 'w')\n"
            f"WIDE = {WIDE!r}\n{code}\n"
        )
        ncu.chmod(0o755)
        path, error = tmp_path / "counters.json", None
        try:
            counters.main(["--device", "cuda", "--ncu", str(ncu), "--json", str(path)])
        except SystemExit as end:
            error = end.code
        return error, json.loads(path.read_text()) if path.exists() else None, capsys.readouterr().out

    return run


def test_every_subject_is_a_process(profile, load):
    error, data, _ = profile("assert sys.argv[-4:-2] == ['--device', 'cuda']; log.write(WIDE)")
    assert error is None
    assert [row["pass"] for row in data["rows"]] == ["attention_forward", "fill"] * len(load("counters").SUBJECTS)


def test_metrics_that_ncu_does_not_know_are_left_out(profile):
    code = """
unknown = [m for m in metrics if "hmma" in m]
if unknown:
    log.write(f"==ERROR== Failed to find metric {unknown[0]}\\n")
    sys.exit(1)
log.write(WIDE)
"""
    error, data, _ = profile(code)
    assert error is None
    assert len(data["rows"]) == 10
    assert sum("ncu does not know sm__inst_executed_pipe_tensor_op_hmma.sum" in note for note in data["notes"]) == 5


@pytest.mark.parametrize(
    "message",
    [
        "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters",
        "==ERROR== Failed to initialize the profiler: LibraryNotLoaded",
    ],
)
def test_no_permission(profile, message):
    error, _, printed = profile(f"log.write({message!r})")
    assert error == 77
    assert printed.splitlines()[-1] == f"ncu may not read the counters here: {message}"


def test_marks_that_do_not_reach_ncu(profile):
    code = """
if "--profile-from-start" in sys.argv:
    log.write("==WARNING== No kernels were profiled.\\n")
else:
    log.write(WIDE)
"""
    error, data, _ = profile(code)
    assert error is None
    assert len(data["rows"]) == 10
    assert "attention decode: watched from the start" in " ".join(data["notes"])


def test_a_subject_that_fails_leaves_the_others(profile):
    code = """
if subject == "attention backward":
    print("==ERROR== The application returned an error code (1).")
    sys.exit("RuntimeError: an illegal memory access was encountered")
log.write(WIDE)
"""
    error, data, _ = profile(code)
    assert "andromeda: attention backward: ncu, exit code 1: ==ERROR== The application" in error
    assert "an illegal memory access" in error
    assert len(data["rows"]) == 8


def test_no_ncu(load, monkeypatch, capsys):
    counters = load("counters")
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    with pytest.raises(SystemExit) as end:
        counters.main(["--device", "cpu"])
    assert end.value.code == 77
    assert "not found" in capsys.readouterr().out


def test_calls_that_are_watched(load, capsys):
    load("counters").main(["--device", "cpu", "--without-ncu"])
    assert "token_shift_norm ..." in capsys.readouterr().err


def test_kernels_that_are_named_exist(load):
    """A kernel with another name would be shown, but no prediction would match it."""
    kernels = set()
    for path in (ROOT / "csrc" / "cuda").rglob("*.cuh"):
        prefix = "hopper::" if path.parent.name == "hopper" else ""
        kernels |= {prefix + name for name in re.findall(r"(\w+)_kernel\(", path.read_text())}
    named = {p["pass"] for p in load("predictions").load() if p["op"] == "kernel"}
    assert named | set(load("counters").TILES) <= kernels


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_form(load):
    predictions = load("predictions")
    known = predictions.load()
    assert len(known) > 20
    for entry in known:
        more = {"against"} if entry["metric"] == "speedup" else set()
        assert entry.keys() == predictions.FIELDS | more
        assert 0 <= entry["low"] < entry["high"]
        assert entry["why"].endswith(".")
        assert all(isinstance(name, str) for name in entry["gpus"]) and entry["gpus"]
    names = [(*(entry[name] for name in predictions.KEY), entry["metric"], *entry["gpus"]) for entry in known]
    assert len(set(names)) == len(names)


def rows_of_the_benchmarks(load):
    """Keys and columns of all rows that `quick` and `profile` of tests/gpu.sh make on a GPU, without measuring."""
    attn, grid, counters, rotary = (load(name) for name in ("attn", "attn_grid", "counters", "qk_norm_rotary"))
    found = {}
    for line in grid.GRID:
        request = grid.arguments_of(line, grid.parse(["--device", "cpu"]))
        for case in attn.all_cases(request):
            step, dtype = case.step, str(case.dtype).removeprefix("torch.")
            columns = {"tflops", "of_copy", "speedup"} if step == "decode" else {"tflops", "speedup"}
            for contender in attn.contenders(dataclasses.replace(case, device="cuda"), request):
                found["attention", step, case.shape, dtype, contender.name] = columns
    columns = {"shared_per_tile", "hmma_per_tile", "conflicts", "hmma_share", "shared_share", "dram_of_least"}
    of_wgmma = {"gmma_per_tile", "slots_per_tile", "tensor_share", "xu_share"}
    kernels = {
        "attention_forward": columns,
        "attention_backward_dq": columns - {"dram_of_least"},
        "attention_backward_dkdv": columns - {"dram_of_least"},
        "attention_decode": columns - {"shared_per_tile", "hmma_per_tile"},
        "hopper::attention_forward_wgmma": of_wgmma | {"dram_of_least"},
        "hopper::attention_backward_dq_wgmma": of_wgmma,
        "hopper::attention_backward_dkdv_wgmma": of_wgmma,
        "hopper::attention_decode_cluster": {"dram_of_least"},
        **{kernel: {"dram_of_least"} for kernel in counters.LEAST_BYTES},
    }
    everything = dict.fromkeys(counters.METRICS, "1")
    for kernel, having in kernels.items():
        row = counters.make_row({"kernel": f"{kernel}_kernel", **everything}, 132, 9)
        assert all(row[name] is not None for name in having)
        found[tuple(row[name] for name in load("predictions").KEY)] = having
    request = rotary.parse(["--device", "cpu", "--seqlen", "32768"])  # its length on a GPU
    shape = f"b1 n{request.seqlen} h{request.heads}/1 d{request.head_dim} r{request.head_dim // 2}"
    for step, name in itertools.product(("forward", "backward"), load("operations").backends("cuda")):
        found["qk_norm_rotary", step, shape, request.dtype, name] = {"of_copy"}
        found["token_shift_norm", step, counters.SHIFT_SHAPE, "bfloat16", name] = {"of_copy"}
    return found | rows_of_products(load)


def rows_of_products(load):
    found, triton = {}, load("checks").TRITON
    lce = load("linear_cross_entropy")
    rows = lce.GPU_BLOCK_LOGITS // 50304
    found["cross_entropy", "training", f"n{rows} v50304", "bfloat16", triton] = {"of_copy"}
    for step, name in itertools.product(("forward", "training"), (triton, "torch")):
        found["linear_cross_entropy", step, "n8192 dim2560 v50304", "bfloat16", name] = {"of_matmul", "speedup"}
    decode, shape = load("decode"), load("model").GPU_SHAPE
    shape = f"context 512 dim{shape['dim']} depth{shape['depth']} h{shape['heads']}/1 d{shape['dim_head']}"
    for name in (decode.CAPTURED, decode.LAUNCHED):
        found["model", "generate", shape, "bfloat16", name] = {"median_ms", "speedup"}
    return found


def test_predictions_name_rows_that_are_measured(load, monkeypatch):
    monkeypatch.setattr(load("cases"), "on_hopper", lambda: True)
    found = rows_of_the_benchmarks(load)
    for entry in load("predictions").load():
        key = tuple(entry[name] for name in load("predictions").KEY)
        assert entry["metric"] in found.get(key, ()), f"{key} has no {entry['metric']}"
        if "against" in entry:
            assert (*key[:-1], entry["against"]) in found


@pytest.mark.parametrize(("name", "shape"), [("qk_norm_rotary", "ROTARY_SHAPE"), ("token_shift_norm", "SHIFT_SHAPE")])
def test_the_shape_that_is_watched_is_that_of_the_benchmark(load, tmp_path, name, shape):
    if not (FOLDER / f"{name}.py").exists():
        pytest.skip(f"no benchmark of {name} in this version")
    path = tmp_path / "rows.json"
    load(name).main(["--device", "cpu", "--seqlen", "16", "--quick", "--json", str(path)])
    measured = json.loads(path.read_text())["rows"][0]["shape"]
    assert measured.replace("n16 ", "n32768 ") == getattr(load("counters"), shape)


ENTRY = {
    "op": "attention", "pass": "forward", "shape": "s", "dtype": "bfloat16", "backend": "andromeda", "gpus": ["H200"],
    "metric": "tflops", "low": 300, "high": 400, "why": "Because.",
}  # fmt: skip


def row(backend="andromeda", **more):
    return {"op": "attention", "pass": "forward", "shape": "s", "dtype": "bfloat16", "backend": backend, **more}


@pytest.mark.parametrize(
    ("measured", "verdict", "of_middle"),
    [
        (350.0, "as expected", 1.0),
        (300, "as expected", 300 / 350),
        (299, "below", 299 / 350),
        (420, "above", 1.2),
        (None, "not measured", None),
    ],
)
def test_verdicts(load, measured, verdict, of_middle):
    [line] = load("predictions").compare([row(tflops=1), row(tflops=measured)], "NVIDIA H200", [ENTRY])
    assert (line["verdict"], line["measured"]) == (verdict, measured)
    assert line["of_middle"] == (None if of_middle is None else pytest.approx(of_middle))


def test_predictions_of_other_gpus_are_left_out(load):
    assert load("predictions").compare([row(tflops=1)], "NVIDIA A100", [ENTRY]) == []
    [line] = load("predictions").compare([], "NVIDIA H200", [{**ENTRY, "low": 0}])
    assert (line["verdict"], line["of_middle"]) == ("not measured", None)


def test_speedups_compare_rows_of_the_same_rounds(load):
    entry = {**ENTRY, "metric": "speedup", "against": "andromeda, no windows", "low": 1.4, "high": 1.6}
    other = row("andromeda, no windows", median_ms=3.0, measured_at=[1, 2])
    for at, verdict in (([1, 2], "as expected"), ([5, 6], "not measured")):
        rows = [row(median_ms=2.0, measured_at=at), other]
        [line] = load("predictions").compare(rows, "NVIDIA H200", [entry])
        assert (line["verdict"], line["metric"]) == (verdict, "speedup over andromeda, no windows")


def test_command(tmp_path):
    entry = json.loads((FOLDER / "predictions.json").read_text())[0]
    measured = {name: entry[name] for name in ("op", "pass", "shape", "dtype", "backend")} | {entry["metric"]: 1e9}
    data = {"environment": {"gpu": "NVIDIA H200"}, "measured": {"quick": {"grid": {"rows": [measured]}, "x": {}}}}
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    command = [sys.executable, str(FOLDER / "predictions.py"), str(tmp_path / "gpu.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "above" in printed
