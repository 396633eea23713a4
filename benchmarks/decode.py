"""Cached generation: tokens per second at several context lengths.

    python benchmarks/decode.py [--device cpu|cuda] [--context 512 4096] [--quick] [--json F] [--plot F]

Compares a step with the cache and a step without it. x-transformers must run without a cache when ALiBi, xPos and token
shift are on, since its cache does not support them (docs/model.md#13.10). `ratio` is x-transformers' time divided by
the row's.
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
    parser.add_argument("--context", type=int, nargs="+")
    model_benchmark.add_model_arguments(parser)
    args = parser.parse_args(argv)
    model_benchmark.set_shape(args, model_benchmark.CPU_SHAPE)
    args.context = args.context or ([128] if args.quick else [512, 4096])
    if args.quick:
        args.rounds = 2
    return args


def run(context: int, args: argparse.Namespace) -> list[dict]:
    ours, other = model_benchmark.build_pair(args, context + 64)
    if other is None:
        sys.exit("benchmarks/decode.py compares with x-transformers: pip install x-transformers==2.31.10")
    tokens = torch.randint(args.num_tokens, (1, context), device=args.device)
    cache = Cache(capacity=context + 64)

    with torch.no_grad():
        ours(tokens, cache=cache)

        def cached_step() -> torch.Tensor:
            cache.keep_last(context - 1)  # every step attends to `context` keys, whatever the number of earlier steps
            return ours(tokens[:, -1:], cache=cache)

        functions = {
            "andromeda, cached step": torch.no_grad()(cached_step),
            "andromeda, recomputed": torch.no_grad()(lambda: ours(tokens)),
            model_benchmark.BASELINE: torch.no_grad()(lambda: other.net(tokens)),
        }
        timings = timing.measure(functions, device=args.device, rounds=args.rounds, budget_s=60)
    return [
        report.make_row(
            measured,
            op="model",
            step="decode",
            shape=f"context {context} dim{args.dim} depth{args.depth} h{args.heads}/1 d{args.dim_head}",
            dtype="float32",
            device=args.device,
            backend=name,
            tokens=1,
            spreads={"ratio": timing.paired_ratio(timings[model_benchmark.BASELINE], measured)},
        )
        for name, measured in timings.items()
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = []
    for context in args.context:
        print(f"context {context} ...", file=sys.stderr)
        rows += run(context, args)
        report.save_unfinished(args, rows, device=args.device, notes=[])
    report.finish(args, rows, device=args.device, title="Generation, one token at a time", notes=[])


if __name__ == "__main__":
    main()
