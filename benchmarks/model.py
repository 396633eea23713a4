"""The model beside x-transformers with the same weights: forward pass and training step, time and memory.

    python benchmarks/model.py [--device cpu|cuda] [--seqlen 4096] [--pass forward training] [--quick] [--json F]

Both models compute the same function; their outputs are compared before anything is timed. Every flag is at its
default. The vocabulary is small (bytes): the output projection is the same matrix product on both sides and would only
hide the rest (--num-tokens 50304 shows by how much). `ratio` is x-transformers' time divided by the row's.
"""

from __future__ import annotations

import argparse
import sys

import report
import timing
import torch

import andromeda

BASELINE = "x-transformers"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The device and the shape of the two models; how much is measured, shown and written."""
    report.add_device_argument(parser)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim-head", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    report.add_arguments(parser)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seqlen", type=int, nargs="+")
    parser.add_argument("--pass", dest="steps", choices=("forward", "training"), nargs="+")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    args.seqlen = args.seqlen or ([256] if args.quick else [4096])
    args.steps = args.steps or ["forward", "training"]
    if args.quick:
        args.rounds = 2
    return args


def build_pair(args: argparse.Namespace, seqlen: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our model and x-transformers' wrapper of the same function (SPEC 14), with equal weights."""
    try:
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
    except ImportError:
        sys.exit("benchmarks/model.py compares with x-transformers: pip install x-transformers==2.31.10")
    alibi_heads = max(args.heads // 2, 1)
    torch.manual_seed(0)
    other = TransformerWrapper(
        num_tokens=args.num_tokens,
        max_seq_len=seqlen,
        use_abs_pos_emb=False,
        attn_layers=Decoder(
            dim=args.dim, depth=args.depth, heads=args.heads, attn_dim_head=args.dim_head, attn_flash=True,
            attn_one_kv_head=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True, alibi_pos_bias=True,
            alibi_num_heads=alibi_heads, rotary_xpos=True, shift_tokens=1, disable_abs_pos_emb=True, pre_norm=False,
            scale_residual=True, scale_residual_constant=(2 * args.depth) ** 0.25, verbose=False,
        ),
    )  # fmt: skip
    ours = andromeda.Andromeda(
        num_tokens=args.num_tokens, max_seq_len=seqlen, dim=args.dim, depth=args.depth, dim_head=args.dim_head,
        heads=args.heads, alibi_num_heads=alibi_heads,
    )  # fmt: skip
    ours.load_x_transformers(other.state_dict())
    wrapped = AutoregressiveWrapper(other, ignore_index=-100, pad_value=0)
    return ours.to(args.device), wrapped.to(args.device)


def run(step: str, seqlen: int, args: argparse.Namespace) -> list[dict]:
    ours, other = build_pair(args, seqlen)
    tokens = torch.randint(args.num_tokens, (1, seqlen + (step == "training")), device=args.device)
    if step == "forward":
        with torch.no_grad():
            difference = (ours(tokens) - other.net(tokens)).abs().max().item()
        # Two float32 computations of logits of magnitude 1 (SPEC 15 allows 2e-5 for one of them against float64).
        if not difference < 1e-4:
            sys.exit(f"model.py: the two models differ by {difference:.2g}: not timed")
        functions = {
            "andromeda": torch.no_grad()(lambda: ours(tokens)),
            BASELINE: torch.no_grad()(lambda: other.net(tokens)),
        }
    else:
        functions = {
            "andromeda": training_step(ours, lambda: ours(tokens, return_loss=True)),
            BASELINE: training_step(other, lambda: other(tokens)),
        }
    timings = timing.measure(functions, device=args.device, rounds=args.rounds, budget_s=90)
    memory = {name: timing.peak_memory_mb(function, args.device) for name, function in functions.items()}
    shape = f"b1 n{seqlen} dim{args.dim} depth{args.depth} h{args.heads}/1 d{args.dim_head} v{args.num_tokens}"
    return [
        report.make_row(
            measured,
            op="model",
            step=step,
            shape=shape,
            dtype="float32",
            device=args.device,
            backend=name,
            tokens=seqlen,
            spreads={"ratio": timing.paired_ratio(timings[BASELINE], measured)},
            peak_memory_mb=memory[name],
        )
        for name, measured in timings.items()
    ]


def training_step(model: torch.nn.Module, loss_of):
    """Loss, gradients and an AdamW update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()

    return step


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows, notes = [], []
    for step in args.steps:
        for seqlen in args.seqlen:
            print(f"{step} {seqlen} tokens ...", file=sys.stderr)
            new = run(step, seqlen, args)
            rows += new
            ours, other = new
            low, high = ours["ratio_range"]
            text = f"{step}, {seqlen} tokens: {ours['ratio']:.2f}x the speed of x-transformers"
            text += f" (rounds {low:.2f} to {high:.2f})"
            if ours["peak_memory_mb"] is not None:
                text += f", {ours['peak_memory_mb'] / other['peak_memory_mb']:.2f} of its peak memory"
            notes.append(text + ".")
    report.finish(args, rows, device=args.device, title="Model, float32, every flag at its default", notes=notes)


if __name__ == "__main__":
    main()
