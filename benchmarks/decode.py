"""Cached generation: tokens per second at several context lengths.

    python benchmarks/decode.py [--device cpu|cuda] [--context 512 4096] [--quick] [--json F] [--plot F]

One step with the cache beside one step without it, which is what x-transformers must do when ALiBi, xPos and token
shift are on (its cache cannot serve them, SPEC 13.10). `ratio` is x-transformers' time divided by the row's.
"""

from __future__ import annotations

import argparse
import sys

import model as model_benchmark
import report
import timing
import torch

from andromeda.generation import Cache


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, nargs="+")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim-head", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    report.add_arguments(parser)
    args = parser.parse_args(argv)
    args.context = args.context or ([128] if args.quick else [512, 4096])
    if args.quick:
        args.rounds = 2
    return args


def run(context: int, args: argparse.Namespace) -> list[dict]:
    ours, other = model_benchmark.build_pair(args, context + 64)
    tokens = torch.randint(args.num_tokens, (1, context), device=args.device)
    cache = Cache(capacity=context + 64)

    with torch.no_grad():
        ours(tokens, cache=cache)
        functions = {
            "andromeda, cached step": torch.no_grad()(lambda: ours(tokens[:, -1:], cache=cache)),
            "andromeda, recomputed": torch.no_grad()(lambda: ours(tokens)),
            model_benchmark.BASELINE: torch.no_grad()(lambda: other.net(tokens)),
        }
        timings = timing.measure(functions, device=args.device, rounds=args.rounds, budget_s=60)
    rows = []
    for name, measured in timings.items():
        row = {
            "op": "model",
            "pass": "decode",
            "shape": f"context {context} dim{args.dim} depth{args.depth} h{args.heads}/1 d{args.dim_head}",
            "dtype": "float32",
            "device": args.device,
            "backend": name,
            "median_ms": measured.median_ms,
            "p20_ms": measured.p20_ms,
            "p80_ms": measured.p80_ms,
            "tflops": None,
            "gbps": None,
            "tokens_per_s": 1e3 / measured.median_ms,
            "ratio": timing.paired_ratio(timings[model_benchmark.BASELINE], measured)[0],
            "peak_memory_mb": None,
        }
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = []
    for context in args.context:
        print(f"context {context} ...", file=sys.stderr)
        rows += run(context, args)
    report.finish(args, rows, device=args.device, title="Generation, one token at a time", notes=[])


if __name__ == "__main__":
    main()
