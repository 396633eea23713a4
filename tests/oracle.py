"""x-transformers 2.31.10 as the oracle (docs/model.md#14): the same function, from the arguments of `Andromeda`."""

import math

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from andromeda.checkpoint import x_transformers_names

# The defaults of `Andromeda`, at sizes for tests.
SMALL = dict(
    num_tokens=23, max_seq_len=48, dim=24, depth=1, dim_head=8, heads=2, use_abs_pos_emb=False, alibi_pos_bias=True,
    alibi_num_heads=1, rotary_xpos=True, attn_flash=True, deepnorm=True, shift_tokens=1, attn_one_kv_head=True,
    qk_norm=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True,
)  # fmt: skip


def build_oracle(arguments: dict) -> AutoregressiveWrapper:
    """The oracle for constructor arguments of `Andromeda`, with its own random weights."""
    a = SMALL | arguments
    norm_on = a["qk_norm"] and a["attn_qk_norm"]
    alibi = a["alibi_pos_bias"] and a["alibi_num_heads"] != 0  # docs/model.md#13.5: zero heads crash the oracle
    options = {"attn_qk_norm_dim_scale": a["attn_qk_norm_dim_scale"]} if norm_on else {}
    if a["deepnorm"]:
        options |= dict(pre_norm=False, scale_residual=True, scale_residual_constant=(2 * a["depth"]) ** 0.25)
    decoder = Decoder(
        dim=a["dim"],
        depth=a["depth"],
        heads=a["heads"],
        attn_dim_head=a["dim_head"],
        # docs/model.md#14: without its fused path the oracle computes the softmax in float32 for every dtype.
        attn_flash=True,
        attn_one_kv_head=a["attn_one_kv_head"],
        attn_qk_norm=norm_on,
        alibi_pos_bias=alibi,
        alibi_num_heads=a["alibi_num_heads"] if alibi else None,
        rotary_xpos=a["rotary_xpos"],
        shift_tokens=a["shift_tokens"],
        disable_abs_pos_emb=not a["use_abs_pos_emb"],
        attn_project_out=True,  # docs/model.md#13.11
        verbose=False,
        **options,
    )
    net = TransformerWrapper(
        num_tokens=a["num_tokens"],
        max_seq_len=a["max_seq_len"],
        use_abs_pos_emb=a["use_abs_pos_emb"],
        attn_layers=decoder,
    )
    return AutoregressiveWrapper(net, ignore_index=-100, pad_value=0)


def widen(oracle: AutoregressiveWrapper, arguments: dict) -> AutoregressiveWrapper:
    """The oracle in float64, with position tables computed in float64 instead of rounded to float32."""
    a = SMALL | arguments
    oracle = oracle.double()
    if a["rotary_xpos"]:
        table = oracle.net.attn_layers.rotary_pos_emb
        r = a["dim_head"] // 2
        twice_t = torch.arange(0, r, 2, dtype=torch.float64)
        table.inv_freq.copy_(10000 ** (-twice_t / r))
        table.scale.copy_((twice_t + 0.4 * r) / (1.4 * r))
    for module in oracle.modules():
        slopes = getattr(module, "slopes", None)
        if isinstance(slopes, torch.Tensor) and slopes.numel():
            slopes.copy_(torch.tensor(alibi_slopes(slopes.numel()), dtype=torch.float64).view_as(slopes))
    return oracle


def alibi_slopes(heads: int) -> list[float]:
    """The slopes of docs/model.md#5.4, independent of those in the package."""
    even = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (head + 1) / even) for head in range(even)]
    return slopes + [2.0 ** (-4 * (2 * head + 1) / even) for head in range(heads - even)]


def perturb(module: torch.nn.Module) -> None:
    """Change every parameter, so that scales, gains and biases are also compared."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def parameter_pairs(model, oracle) -> list[tuple[str, torch.nn.Parameter, torch.nn.Parameter]]:
    """(x-transformers name, ours, the oracle's) for every parameter."""
    ours, theirs = dict(model.named_parameters()), dict(oracle.net.named_parameters())
    names = x_transformers_names(model)
    assert set(names) == set(theirs) and sorted(names.values()) == sorted(ours)
    return [(name, ours[own], theirs[name]) for name, own in names.items()]
