"""The time of a call on the host, up to its launch: `python -m emulator.host_time [--json FILE]` in the folder tests.

Operators, bindings and launchers are the real ones. The tensors are CPU tensors that the bindings take for GPU tensors,
and a launch returns at once: the first row is what remains of it, and all others are beyond it. The time is therefore
that of the host alone, without CUDA's own launch (about 2 us). It includes torch's functions that allocate, here from
the heap of the CPU, but not those for the current stream of a GPU (0.1 us; a call for few queries also asks whether a
graph is being captured: 0.5 us). It is the processor time of this process, so other processes have little effect; the
minimum of several runs counts.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from emulator import Emulator


def draw(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def calls():
    """name -> a call that launches one kernel and needs no gradient: the shapes of a layer of the default model."""
    from andromeda import attention, qk_norm_rotary
    from andromeda.ops.token_shift_norm import token_shift_norm, unsupported

    slopes, bound = torch.rand(24), torch.rand(24) + 1
    q_scale, k_scale = torch.rand(24, 128), torch.rand(1, 128)
    cache = draw(1, 131_072, 1, 128)
    q, k = draw(1, 1, 24, 128), draw(1, 1, 1, 128)
    prompt_q, prompt_k = draw(1, 512, 24, 128), draw(1, 512, 1, 128)
    x, vector = draw(1, 1, 2560), torch.rand(2560)
    biased = {"causal": True, "alibi_slopes": slopes, "logit_bound": bound}
    rotation = {"q_scale": q_scale, "k_scale": k_scale, "rotary_dim": 64, "xpos": True}
    found = {
        "attention, 512 tokens": lambda: attention(prompt_q, prompt_k, prompt_k, **biased),
        "attention, 1 token, 131072 keys": lambda: attention(q, cache, cache, **biased),
        "qk_norm_rotary, 512 tokens": lambda: qk_norm_rotary(prompt_q, prompt_k, **rotation),
        "qk_norm_rotary, 1 token": lambda: qk_norm_rotary(q, k, position=700, origin=4096, **rotation),
    }
    if not unsupported("cuda", x):
        residual = {"residual": x, "residual_scale": vector, "alpha": 2.8, "shift": 1}
        found["token_shift_norm, 1 token"] = lambda: token_shift_norm(x, gamma=vector, **residual)
    return found


def training_calls():
    """name -> a call with gradients: the operator of the backward pass, and both passes through torch.autograd."""
    from andromeda import attention
    from andromeda.ops import attention as operation

    q, k, dout = draw(1, 512, 24, 128), draw(1, 512, 1, 128), draw(1, 512, 24, 128)
    slopes, bound = torch.rand(24), torch.rand(24) + 1
    record = operation.Call(q, k, k, slopes, bound, None, True, 128**-0.5, "auto")
    results = operation.FORWARD(*record)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, k)]

    def both_passes():
        out = attention(*leaves, causal=True, alibi_slopes=slopes, logit_bound=bound)
        torch.autograd.grad(out, leaves, dout)

    return {
        "attention, 512 tokens, backward": lambda: operation.BACKWARD(dout, *results, *record),
        "attention, 512 tokens, both passes": both_passes,
    }


def microseconds(call, num_runs, num_calls):
    """The minimum and the median time of a call."""
    for _ in range(num_calls // 4):
        call()
    runs = []
    for _ in range(num_runs):
        begin = time.process_time()
        for _ in range(num_calls):
            call()
        runs.append((time.process_time() - begin) / num_calls * 1e6)
    return min(runs), statistics.median(runs)


def prepare(emulator):
    """Make the operators run backend "cuda" on CPU tensors without copies."""
    from andromeda.ops import _select
    from andromeda.ops import attention as operation

    table = emulator._host.gpu_exchange_table()
    if table is None:
        raise SystemExit("host_time: this torch has no DLPack exchange table: 2.10 or later is needed")
    torch.Tensor.__dlpack_c_exchange_api__ = table
    _select.extension = emulator.extension
    _select.cuda_unavailable = lambda device: []
    _select.DEVICE_TYPES = {"cuda": "cpu", "triton": "no device", "cpu": "no device"}
    operation._check_values = lambda *_: None  # it would read CPU tensors


def measure(num_runs, num_calls):
    emulator = Emulator(device="H200", execute=False)
    prepare(emulator)
    rows = []
    gc.disable()

    def add(named, num_at_once=1):
        for name, call in named.items():
            least, median = (time / num_at_once for time in microseconds(call, num_runs, num_calls))
            rows.append({"call": name, "us": round(least, 2), "median_us": round(median, 2)})

    with emulator:
        add({"launch alone": lambda: emulator._host.subject.launch_repeatedly(100)}, num_at_once=100)
        with torch.inference_mode():
            add(calls())
        add(training_calls())
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--calls", type=int, default=2000, help="of each run")
    parser.add_argument("--json", help="write the rows to this file, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.runs, arguments.calls)
    width = max(len(row["call"]) for row in rows)
    for row in rows:
        print(f"{row['call']:{width}}  {row['us']:5.2f} us  (median {row['median_us']:.2f})")
    if arguments.json:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
        import report

        data = {"environment": report.environment("cpu"), "rows": rows}
        report.write_text(Path(arguments.json), json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
