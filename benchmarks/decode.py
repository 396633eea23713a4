"""Cached generation: time per token at several context lengths.

    python benchmarks/decode.py [--device cpu|cuda] [--context 512 4096] [--new-tokens 64] [--quick] [--json F]

Pass `decode` compares a call on one token with the cache and a call on the whole sequence without it. x-transformers
must run without a cache when ALiBi, xPos and token shift are on, since its cache does not support them
(docs/model.md#13.10). `ratio` is x-transformers' time divided by the row's; without x-transformers its row is left out.

On a GPU, pass `generate` is the time from one token of `generate` to the next, the median of --new-tokens of them after
the first ones. "andromeda, captured step" repeats a CUDA graph, "andromeda, launched step" launches the same kernels
one by one; `ratio` is the time of the latter divided by the row's. A GPU has models in bfloat16 and the size of
benchmarks/model.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
import time

import checks
import model as model_benchmark
import report
import timing
import torch

import andromeda
from andromeda.generation import Cache

CAPTURED, LAUNCHED = f"{checks.OURS}, captured step", f"{checks.OURS}, launched step"
FIRST_TOKENS = 16  # of a call of `generate`: they contain the prompt, and recording the graph


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, nargs="+")
    parser.add_argument("--new-tokens", type=int, help="of generate")
    model_benchmark.add_model_arguments(parser)
    args = parser.parse_args(argv)
    large = args.device == "cuda" and not args.quick
    model_benchmark.set_shape(args, model_benchmark.GPU_SHAPE if large else model_benchmark.CPU_SHAPE)
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.context = args.context or ([128] if args.quick else [512, 4096])
    args.new_tokens = args.new_tokens or (4 if args.quick else 64)
    if args.quick:
        args.rounds = 2
    return args


def run(context: int, args: argparse.Namespace) -> list[dict]:
    """The rows of a context length."""
    room = FIRST_TOKENS + args.new_tokens
    ours, other = (
        None if net is None else net.to(args.dtype) for net in model_benchmark.build_pair(args, context + room)
    )
    tokens = torch.randint(args.num_tokens, (1, context), device=args.device)
    timings = calls(ours.eval(), other, tokens, args)
    rows = rows_of("decode", timings, model_benchmark.BASELINE, context, args)
    if args.device == "cuda":
        rows += rows_of("generate", steps(ours, tokens, args), LAUNCHED, context, args)
    return rows


def calls(
    ours: andromeda.Andromeda, other: torch.nn.Module | None, tokens: torch.Tensor, args: argparse.Namespace
) -> dict[str, timing.Timing]:
    """Calls of the models for the token after `tokens`."""
    context = tokens.shape[1]
    cache = Cache(capacity=context + 64)

    def cached_step() -> torch.Tensor:
        cache.keep_last(context - 1)  # every step attends to `context` keys, whatever the number of earlier steps
        return ours(tokens[:, -1:], cache=cache)

    functions = {"andromeda, cached step": cached_step, "andromeda, recomputed": lambda: ours(tokens)}
    if other is not None:
        functions[model_benchmark.BASELINE] = lambda: other.net(tokens)
    with torch.no_grad():
        ours(tokens, cache=cache)
        return timing.measure(functions, device=args.device, rounds=args.rounds, budget_s=60)


def steps(ours: andromeda.Andromeda, tokens: torch.Tensor, args: argparse.Namespace) -> dict[str, timing.Timing]:
    """A token of `generate` after the first ones, with a graph and without."""
    found: dict[str, list[float]] = {CAPTURED: [], LAUNCHED: []}
    begin = time.time()
    for _ in range(args.rounds):
        generated = []
        for name, samples in found.items():
            clock = []

            def note(_: torch.Tensor, clock: list[float] = clock) -> None:
                torch.cuda.synchronize()
                clock.append(time.perf_counter())

            options = {"temperature": 0, "cuda_graph": name == CAPTURED, "on_token": note}
            generated.append(ours.generate(tokens, FIRST_TOKENS + args.new_tokens, **options))
            waits = [1e3 * (after - before) for before, after in itertools.pairwise(clock[FIRST_TOKENS - 1 :])]
            samples.append(statistics.median(waits))
        if not torch.equal(*generated):
            sys.exit("decode.py: a captured step does not generate the tokens of the same step launched")
    return {name: timing.Timing(samples, (begin, time.time())) for name, samples in found.items()}


def rows_of(
    step: str, timings: dict[str, timing.Timing], base: str, context: int, args: argparse.Namespace
) -> list[dict]:
    """base: the row that ratios refer to."""
    return [
        report.make_row(
            measured,
            op="model",
            step=step,
            shape=f"context {context} dim{args.dim} depth{args.depth} h{args.heads}/1 d{args.dim_head}",
            dtype=str(args.dtype).removeprefix("torch."),
            device=args.device,
            backend=name,
            tokens=1,
            spreads={"ratio": timing.paired_ratio(timings[base], measured)} if base in timings else {},
        )
        for name, measured in timings.items()
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows, notes = [], []
    if importlib.util.find_spec("x_transformers") is None:
        notes.append("x-transformers is not installed, so nothing is compared: pip install x-transformers==2.31.10")
    for context in args.context:
        print(f"context {context} ...", file=sys.stderr)
        rows += run(context, args)
        report.save_unfinished(args, rows, device=args.device, notes=notes)
    report.finish(args, rows, device=args.device, title="Generation, one token at a time", notes=notes)


if __name__ == "__main__":
    main()
