"""The model compared with x-transformers with the same weights: forward pass and training step, time and memory.

    python benchmarks/model.py [--device cpu|cuda] [--seqlen 4096] [--pass forward training generation] [--profile]
                               [--dtype float32|bfloat16] [--num-tokens 256] [--quick] [--json F]

Both models compute the same function; their outputs are compared before anything is timed. Every flag is at its
default. The vocabulary is small (bytes): the output projection is the same matrix product on both sides and would only
mask the other differences (--num-tokens 50304 shows by how much). `ratio` is x-transformers' time divided by the row's.
If x-transformers is not installed or fails, its row is left out.

"andromeda, logits kept" is a training step of the same model with the plain composition: all logits, then
`cross_entropy`, and a feed-forward that keeps its hidden tensors for the backward pass. On a CPU, with --num-tokens
50304 --seqlen 8192, the bars of benchmarks/bars.py compare the two. --profile adds, from torch's profiler, the kernels
that take the time of a training step and their shares (benchmarks/profiles.py).

On a GPU the model has the default width and a quarter of the default depth, and runs under autocast to bfloat16, as
training does there: the kernels do not support float32. `mfu` is the model's own operations per second, without
recomputation and with half of the score matrix, divided by the dense bfloat16 peak of the vendor's data sheet
(`peak_tflops`). `generation` continues a prompt of --seqlen tokens by --new-tokens, one at a time with the cache; its
tokens per second include the prompt's time. It has no baseline, since x-transformers has no cache for ALiBi with xPos.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import types
from collections.abc import Callable

import bars
import checks
import profiles
import report
import timing
import torch

import andromeda
from andromeda.model import FeedForward, cross_entropy

BASELINE = "x-transformers"
KEPT = f"{checks.OURS}, logits kept"
GPU_SHAPE = {"dim": 2560, "depth": 8, "heads": 24, "dim_head": 128, "num_tokens": 50304}
CPU_SHAPE = {"dim": 512, "depth": 4, "heads": 8, "dim_head": 64, "num_tokens": 256}
# Two float32 computations of logits of magnitude 1 (docs/model.md#15 allows 2e-5 for one against float64); under
# autocast each layer's operands are rounded to eight bits.
AGREEMENT = {"float32": 1e-4, "bfloat16": 0.1}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the device, the shape of the two models, the measurement and the output."""
    report.add_device_argument(parser)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--dim-head", type=int)
    parser.add_argument("--num-tokens", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    report.add_arguments(parser)


def set_shape(args: argparse.Namespace, shape: dict[str, int]) -> None:
    """Fill in the sizes that the command line does not set."""
    for name, value in shape.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seqlen", type=int, nargs="+")
    parser.add_argument("--pass", dest="steps", choices=("forward", "training", "generation"), nargs="+")
    parser.add_argument("--dtype", choices=AGREEMENT, help="float32, or bfloat16 by autocast (default on a GPU)")
    parser.add_argument("--new-tokens", type=int, help="of generation")
    parser.add_argument("--profile", action="store_true", help="also: what takes the time of a training step")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    set_shape(args, GPU_SHAPE if cuda and not args.quick else CPU_SHAPE)
    args.seqlen = args.seqlen or ([256] if args.quick else [4096])
    args.steps = args.steps or ["forward", "training", *(["generation"] if cuda else [])]
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.new_tokens = args.new_tokens or (4 if args.quick else 64)
    if args.quick:
        args.rounds = 2
    return args


def build_pair(args: argparse.Namespace, seqlen: int) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """Our model, and x-transformers' model of the same function (docs/model.md#14) with equal weights; None if that is
    not installed."""
    alibi_heads = max(args.heads // 2, 1)
    torch.manual_seed(0)
    with torch.device(args.device):  # a GPU draws the weights of a large model quickly
        ours = andromeda.Andromeda(
            num_tokens=args.num_tokens, max_seq_len=seqlen, dim=args.dim, depth=args.depth, dim_head=args.dim_head,
            heads=args.heads, alibi_num_heads=alibi_heads,
        )  # fmt: skip
    if importlib.util.find_spec("x_transformers") is None:
        return ours.to(args.device), None
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

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
    ours.load_x_transformers(other.state_dict())
    wrapped = AutoregressiveWrapper(other, ignore_index=-100, pad_value=0)
    return ours.to(args.device), wrapped.to(args.device)


Calls = dict[str, Callable[[], object]]


def calls_of(step: str, seqlen: int, args: argparse.Namespace) -> tuple[torch.nn.Module, Calls]:
    """Our model, and the calls to time, by name."""
    ours, other = build_pair(args, seqlen + args.new_tokens * (step == "generation"))
    tokens = torch.randint(args.num_tokens, (1, seqlen + (step == "training")), device=args.device)
    if step == "forward":
        calls = {checks.OURS: lambda: ours(tokens), BASELINE: lambda: other.net(tokens)}
    elif step == "training":
        kept = with_logits_kept(ours)
        calls = {
            checks.OURS: lambda: ours(tokens, return_loss=True),
            KEPT: lambda: loss_of_logits(kept, tokens),
            BASELINE: lambda: other(tokens),
        }
    else:
        calls = {checks.OURS: lambda: ours.generate(tokens, args.new_tokens, temperature=0)}
    if other is None:
        calls.pop(BASELINE, None)
    calls = {name: rounded(call, args) for name, call in calls.items()}
    if step == "training":
        models = {checks.OURS: ours, KEPT: kept, BASELINE: other}
        calls = {name: training_step(models[name], call) for name, call in calls.items()}
    return ours, calls


def with_logits_kept(model: andromeda.Andromeda) -> andromeda.Andromeda:
    """A copy whose feed-forward is the plain composition, which keeps its hidden tensors for the backward pass."""

    def plain(self: FeedForward, h: torch.Tensor, call: object) -> torch.Tensor:
        return self.proj_out(torch.nn.functional.gelu(self.proj_in(h)))

    found = copy.deepcopy(model)
    for module in found.modules():
        if isinstance(module, FeedForward):
            module.forward = types.MethodType(plain, module)
    return found


def loss_of_logits(model: andromeda.Andromeda, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of `return_loss=True`, from all logits at once."""
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def rounded(call: Callable, args: argparse.Namespace) -> Callable:
    """The call in the requested precision. Each call enters autocast again, which else keeps rounded weights."""
    if args.dtype == "float32":
        return call

    def under_autocast() -> object:
        with torch.autocast(args.device, torch.bfloat16):
            return call()

    return under_autocast


def prepare(step: str, calls: Calls, args: argparse.Namespace) -> tuple[Calls, list[str]]:
    """The calls that run and agree with ours; notes about the others."""
    functions, notes, expected = {}, [], None
    for name, call in calls.items():
        try:
            result = call()
        except Exception as error:  # any error of another package: only its row is missing
            notes.append(f"{name} did not run {step}: {checks.describe(error, [])}")
            continue
        if step != "generation":  # logits, or the loss of a first training step
            expected = result.float() if expected is None else expected
            difference = (result.float() - expected).abs().max().item()
            if not difference < AGREEMENT[args.dtype]:
                notes.append(f"{checks.OURS} and {name} differ by {difference:.2g}: the latter is not timed")
                continue
        functions[name] = call
    return functions, notes


def run(step: str, seqlen: int, args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    model, calls = calls_of(step, seqlen, args)
    with torch.set_grad_enabled(step == "training"):
        functions, notes = prepare(step, calls, args)
        timings = timing.measure(functions, device=args.device, rounds=args.rounds, budget_s=90)
        memory = {name: timing.peak_memory_mb(function, args.device) for name, function in functions.items()}
        taken = {}
        if args.profile and step == "training":
            taken = {name: profiles.summary(profiles.kernels(call, args.device)) for name, call in functions.items()}
    for name, found in taken.items():
        notes.append(f"{step}, {seqlen} tokens, {name}: {profiles.sentence(found['shares'])}.")
    shape = f"b1 n{seqlen} dim{args.dim} depth{args.depth} h{args.heads}/1 d{args.dim_head} v{args.num_tokens}"
    flops, peak = None, None
    if args.device == "cuda" and step != "generation":
        flops = flops_per_token(model, seqlen) * seqlen * (3 if step == "training" else 1)
        peak = peak_tflops()
    rows = []
    for name, measured in timings.items():
        ratio = {"ratio": timing.paired_ratio(timings[BASELINE], measured)} if BASELINE in timings else {}
        row = report.make_row(
            measured,
            op="model",
            step=step,
            shape=shape,
            dtype=args.dtype,
            device=args.device,
            backend=name,
            flops=flops,
            tokens=args.new_tokens if step == "generation" else seqlen,
            spreads=ratio,
            peak_memory_mb=memory[name],
            **({} if peak is None else {"mfu": flops / measured.median_ms / 1e9 / peak, "peak_tflops": peak}),
            **({"profile": taken[name]} if name in taken else {}),
        )
        rows.append(row)
    return rows, notes


def flops_per_token(model: andromeda.Andromeda, seqlen: int) -> float:
    """Operations of a forward pass: two for each parameter in a product (not the token table), and for each layer two
    products with the half of the keys that a token sees."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters()) - config.num_tokens * config.dim
    return 2.0 * (parameters + config.depth * config.heads * config.dim_head * seqlen)


def peak_tflops() -> float | None:
    """The vendor's figure for dense bfloat16; None for a GPU that is not known here."""
    try:
        from andromeda.training import peak_flops
    except ImportError:  # of transformers, which training needs, but no measurement here
        return None
    peak = peak_flops(torch.device("cuda"))
    return None if peak is None else peak / 1e12


def training_step(model: torch.nn.Module, loss_of: Callable) -> Callable[[], torch.Tensor]:
    """Loss, gradients and an update by the AdamW that transformers' Trainer takes by default. As there, gradients are
    freed at the end of a step: they belong to its memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> torch.Tensor:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def comparison(step: str, seqlen: int, rows: list[dict]) -> list[str]:
    """A sentence that compares our row with the other; none without both rows."""
    by_name = {row["backend"]: row for row in rows}
    if not {checks.OURS, BASELINE} <= by_name.keys():
        return []
    ours, other = by_name[checks.OURS], by_name[BASELINE]
    low, high = ours["ratio_range"]
    text = f"{step}, {seqlen} tokens: {ours['ratio']:.2f}x the speed of x-transformers"
    text += f" (rounds {low:.2f} to {high:.2f})"
    if ours["peak_memory_mb"] is not None:
        text += f", {ours['peak_memory_mb'] / other['peak_memory_mb']:.2f} of its peak memory"
    return [text + "."]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows, notes, lines = [], [], None
    if importlib.util.find_spec("x_transformers") is None:
        notes.append("x-transformers is not installed, so nothing is compared: pip install x-transformers==2.31.10")
    for step in args.steps:
        for seqlen in args.seqlen:
            print(f"{step} {seqlen} tokens ...", file=sys.stderr)
            new, problems = run(step, seqlen, args)
            rows += new
            notes += problems + comparison(step, seqlen, new)
            lines = bars.evaluate_training(rows, KEPT)
            report.save_unfinished(args, rows, device=args.device, notes=notes, bars=lines)
    title = f"Model, {args.dtype}, every flag at its default"
    report.finish(args, rows, device=args.device, title=title, notes=notes, bars=lines)
    checks.exit_if_missing(notes)


if __name__ == "__main__":
    main()
