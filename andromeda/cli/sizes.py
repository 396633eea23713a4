"""Sizes of new models, and of models in general."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Constructor arguments; `andromeda train` has an option for each of them, too.
SIZES = {
    "tiny": {"dim": 128, "depth": 4, "heads": 4, "dim_head": 32, "alibi_num_heads": 2},
    "small": {"dim": 768, "depth": 12, "heads": 12, "dim_head": 64, "alibi_num_heads": 6},
    "medium": {"dim": 1536, "depth": 24, "heads": 12, "dim_head": 128, "alibi_num_heads": 6},
    "full": {},  # the constructor's defaults
}


def model_arguments(size: str, vocabulary: int, seq_len: int) -> dict[str, Any]:
    """Constructor arguments of a model for a tokenizer of `vocabulary` ids and rows of `seq_len` tokens."""
    return {"num_tokens": round_up(vocabulary, 128), "max_seq_len": seq_len} | SIZES[size]


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def parameter_count(model: "torch.nn.Module") -> int:
    """The number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
