"""Makes the golden cases of this folder from x-transformers 2.31.10 (docs/model.md#15): `python tests/golden/make.py`.

Andromeda computes nothing here: `oracle.py` builds x-transformers from the arguments of `Andromeda`, and the expected
values come from it. Weights and tokens come from numpy's frozen generator by exact arithmetic, so every machine makes
the same ones; results are float64, and their last digits may differ between machines.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import oracle  # noqa: E402
from x_transformers import AutoregressiveWrapper  # noqa: E402
from x_transformers.autoregressive_wrapper import min_p, top_k, top_p  # noqa: E402

IGNORE_INDEX = -100
PROMPT_LENGTH, GREEDY_STEPS = 8, 8
SMALLEST_MARGIN = 4e-3  # between the two largest logits of a greedy step: far above the errors of float32
FILTERS = {
    "top_k_default": top_k,
    "top_k_5": lambda logits: top_k(logits, k=5),
    "top_p_0.9": top_p,
    "min_p_0.1": min_p,
}
DEFAULTS = dict(
    num_tokens=24, max_seq_len=32, dim=16, depth=1, dim_head=8, heads=4, use_abs_pos_emb=False, alibi_pos_bias=True,
    alibi_num_heads=2, rotary_xpos=True, attn_flash=True, deepnorm=True, shift_tokens=1, attn_one_kv_head=True,
    qk_norm=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True,
)  # fmt: skip


class Case(NamedTuple):
    description: str
    seed: int
    batch: int
    length: int
    prefill: int  # tokens before those that are decoded one by one
    arguments: dict
    ignored: float = 0.0  # share of the labels


CASES = {
    "all_defaults": Case(
        "every flag at its documented default, tiny sizes", 1, 2, 17, 7, dict(depth=2)
    ),
    "wide_six_heads": Case(
        "all defaults, six heads, three of them ALiBi (3 is not a power of two), dim_head 16",
        2, 1, 24, 9, dict(dim=20, dim_head=16, heads=6, alibi_num_heads=3),
    ),
    "prenorm_depth3": Case(
        "deepnorm off (pre-norm with a final norm), depth 3, labels partly ignored",
        3, 2, 13, 5, dict(deepnorm=False, depth=3, heads=2, alibi_num_heads=1), 0.3,
    ),
    "no_qk_norm_unfused": Case(
        "QK normalisation off, attn_flash off, five heads",
        4, 2, 19, 9, dict(qk_norm=False, attn_qk_norm=False, attn_flash=False, heads=5, alibi_num_heads=4),
    ),
    "fixed_scale_mha": Case(
        "QK norm without learned scales (fixed score scale), one K/V head per query head, all heads ALiBi, pre-norm",
        5, 2, 16, 6,
        dict(attn_qk_norm_dim_scale=False, attn_one_kv_head=False, deepnorm=False, alibi_num_heads=4),
    ),
    "alibi_only": Case(
        "ALiBi as the only position signal, no token shift; the oracle's cache decodes",
        6, 2, 15, 6, dict(rotary_xpos=False, shift_tokens=0, alibi_num_heads=3, depth=2),
    ),
    "xpos_only": Case(
        "rotary xPos as the only position signal, no token shift, dim_head 32, pre-norm; the oracle's cache decodes",
        7, 1, 30, 12, dict(alibi_pos_bias=False, shift_tokens=0, deepnorm=False, dim_head=32, heads=2),
    ),
    "shift_two_no_positions": Case(
        "no position signal except token shift by two; 16 channels do not divide by three segments",
        8, 2, 15, 5, dict(alibi_pos_bias=False, rotary_xpos=False, shift_tokens=2, deepnorm=False, depth=2),
    ),
    "absolute_positions": Case(
        "learned absolute positions only, full length, multi-head K/V, DeepNorm; the oracle's cache decodes",
        9, 2, 18, 8,
        dict(
            use_abs_pos_emb=True, alibi_pos_bias=False, rotary_xpos=False, shift_tokens=0, attn_one_kv_head=False,
            max_seq_len=18, heads=2, depth=2,
        ),
    ),
    "long_ignored_labels": Case(
        "all defaults, length 72, six heads, labels partly ignored",
        10, 1, 72, 40, dict(heads=6, alibi_num_heads=3, max_seq_len=96), 0.25,
    ),
}  # fmt: skip


def draw(net: torch.nn.Module, random: numpy.random.RandomState) -> None:
    """New values for all parameters; scales and biases are off their initial constants."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            numbers = random.uniform(-1, 1, tuple(parameter.shape))
            if parameter.ndim == 1 or name.endswith("scale"):
                constants = 0.0 if name.endswith(("gamma", "bias")) else float(parameter.flatten()[0])
                numbers = constants + 0.1 * numbers
            elif "emb" in name:
                numbers *= 3**0.5 if name.startswith("pos_emb") else (6 / parameter.shape[1]) ** 0.5
            else:
                numbers *= (3 / parameter.shape[1]) ** 0.5
            parameter.copy_(torch.from_numpy(numbers))


def build(case: Case) -> tuple[AutoregressiveWrapper, dict, numpy.random.RandomState]:
    """The oracle in float32 with the weights of the case, its arguments, and the generator behind the weights."""
    arguments = DEFAULTS | case.arguments
    made, random = oracle.build_oracle(arguments), numpy.random.RandomState(case.seed)
    draw(made.net, random)
    return made.eval(), arguments, random


def gradient_keys(arguments: dict) -> list[str]:
    """Parameters at the bottom, in the first attention and at the top whose gradients are stored."""
    fn = "fn." if arguments["shift_tokens"] > 0 else ""
    learned = arguments["qk_norm"] and arguments["attn_qk_norm_dim_scale"]
    last = 2 * arguments["depth"] - 1
    return [
        "token_emb.emb.weight",
        f"attn_layers.layers.0.1.{fn}to_k.weight",
        f"attn_layers.layers.0.1.{fn}" + ("qk_norm_q_scale" if learned else "to_v.weight"),
        f"attn_layers.layers.{last}." + ("2.residual_scale" if arguments["deepnorm"] else "0.0.gamma"),
    ]


def decode(net: torch.nn.Module, tokens: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits of the tokens after the first `prefill` ones, one token at a time through the oracle's cache."""
    _, cache = net(tokens[:, :prefill], return_intermediates=True)
    rows = []
    for end in range(prefill + 1, tokens.shape[1] + 1):
        row, cache = net(tokens[:, :end], return_intermediates=True, cache=cache)
        rows.append(row[:, -1])
    return torch.stack(rows, dim=1)


def greedy(net: torch.nn.Module, prompt: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Tokens of the largest logits, (batch, <= GREEDY_STEPS), up to the first close step, and the smallest margin."""
    tokens, margins = prompt, []
    for _ in range(GREEDY_STEPS):
        best = net(tokens)[:, -1].topk(2, dim=-1)
        margin = (best.values[:, 0] - best.values[:, 1]).min().item()
        if margin < SMALLEST_MARGIN:
            break
        margins.append(margin)
        tokens = torch.cat((tokens, best.indices[:, :1]), dim=1)
    return tokens[:, prompt.shape[1] :], min(margins)


def make_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The description and the tensors of a case."""
    case = CASES[name]
    net, arguments, random = build(case)
    weights = {key: value.detach().clone() for key, value in net.net.named_parameters()}
    tokens = torch.from_numpy(random.randint(0, arguments["num_tokens"], (case.batch, case.length))).to(torch.int64)
    labels = tokens.masked_fill(torch.from_numpy(random.uniform(size=tuple(tokens.shape)) < case.ignored), IGNORE_INDEX)
    with torch.no_grad():
        last = net.net(tokens)[:, -1:]  # float32

    net = oracle.widen(net, arguments)
    logits = net.net(tokens)
    loss = net(labels)
    loss.backward()
    parameters = dict(net.net.named_parameters())
    served = arguments["shift_tokens"] == 0 and not (arguments["alibi_pos_bias"] and arguments["rotary_xpos"])
    with torch.no_grad():
        decoded = {"decode/logits": decode(net.net, tokens, case.prefill)} if served else {}
        continuation, margin = greedy(net.net, tokens[:, :PROMPT_LENGTH])

    keys = gradient_keys(arguments)
    tensors = {f"weights/{key}": value for key, value in weights.items()}
    tensors |= {"tokens": tokens, "loss_tokens": labels, "logits": last, "logits_f64": logits, "loss_f64": loss}
    tensors |= {f"grads_f64/{key}": parameters[key].grad for key in keys}
    tensors |= decoded | {"greedy/tokens": continuation}
    tensors |= {f"filters/{kind}": function(last[:, 0]) for kind, function in FILTERS.items()}
    description = {
        "name": name,
        "description": case.description,
        "oracle": "x-transformers 2.31.10",
        "andromeda_kwargs": arguments,
        "loss_f64": loss.item(),
        "max_abs_logit": logits.abs().max().item(),
        "float32_error": (last.double() - logits[:, -1:]).abs().max().item(),
        "gradients": keys,
        "decode": {
            "prefill": case.prefill,
            "steps": case.length - case.prefill,
            "source": "the oracle's cache" if served else "rows of logits_f64, since the oracle's cache cannot serve",
        },
        "greedy": {
            "prompt_len": PROMPT_LENGTH,
            "steps": continuation.shape[1],
            "smallest_top1_margin": margin,
        },
    }
    return description, {key: value.detach().clone().contiguous() for key, value in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the files (default: this one)")
    folder = parser.parse_args().out
    for name in CASES:
        description, tensors = make_case(name)
        save_file(tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(description, indent=1) + "\n")
        print(f"{name:24}logits to {description['max_abs_logit']:.2f}, greedy {description['greedy']}")


if __name__ == "__main__":
    main()
