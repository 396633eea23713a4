"""`AndromedaConfig`: the arguments of `andromeda.Andromeda` under the names of transformers.

Only this file knows both sets of names: sizes have the names that all transformers models use, and switches that other
models do not have keep the names of the constructor.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from andromeda.huggingface import peft_defaults
from andromeda.huggingface.saving import ConfigSaving

# Constructor argument -> name here. The others have the same name in both, except `attn_one_kv_head`, which
# `num_key_value_heads` replaces.
_NAMES = {
    "num_tokens": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "dim_head": "head_dim",
    "heads": "num_attention_heads",
}
_SWITCHES = (
    "use_abs_pos_emb",
    "alibi_pos_bias",
    "alibi_num_heads",
    "rotary_xpos",
    "attn_flash",
    "deepnorm",
    "shift_tokens",
    "qk_norm",
    "attn_qk_norm",
    "attn_qk_norm_dim_scale",
)


@strict
class AndromedaConfig(ConfigSaving):
    """Sizes and switches of an Andromeda model; the defaults are those of `andromeda.Andromeda` (docs/model.md#1).

    Args:
        vocab_size: number of token ids, `num_tokens`.
        max_position_embeddings: context window of generation, and the size of the absolute table; `max_seq_len`.
        hidden_size: width of the model, `dim`.
        num_hidden_layers: blocks of one attention and one feed-forward layer, `depth`.
        num_attention_heads: query heads, `heads`.
        num_key_value_heads: 1 (`attn_one_kv_head`) or `num_attention_heads`.
        head_dim: width of a head, `dim_head`; `num_attention_heads * head_dim` need not be `hidden_size`.
        use_abs_pos_emb, alibi_pos_bias, alibi_num_heads, rotary_xpos, attn_flash, deepnorm, shift_tokens, qk_norm,
            attn_qk_norm, attn_qk_norm_dim_scale: as in `andromeda.Andromeda`.
        use_cache: return a cache from `forward`, unless its argument `use_cache` is given.
        auto_map: see `ConfigSaving`.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value has the wrong type, or no model has such sizes
            (docs/model.md#1); the message has the constructor's name of the argument.
    """

    model_type = "andromeda"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "token_emb": "free_full_weight",
        "attn_layers.layers.*": "free_full_weight",
    }

    vocab_size: int = 50304
    max_position_embeddings: int = 8192
    hidden_size: int = 2560
    num_hidden_layers: int = 32
    num_attention_heads: int = 24
    num_key_value_heads: int = 1
    head_dim: int = 128
    use_abs_pos_emb: bool = False
    alibi_pos_bias: bool = True
    alibi_num_heads: int | None = 12
    rotary_xpos: bool = True
    attn_flash: bool = True
    deepnorm: bool = True
    shift_tokens: int = 1
    qk_norm: bool = True
    attn_qk_norm: bool = True
    attn_qk_norm_dim_scale: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]  # declared as a constant
        """How transformers shards an `AndromedaModel` for tensor parallelism: heads and hidden units, by processes.

        The number of processes must divide `num_attention_heads`. One key head stays whole in each process.
        """
        heads = ("to_q",) if self.num_key_value_heads == 1 else ("to_q", "to_k", "to_v")
        by_rows, by_columns = (*heads, "proj_in"), ("to_out", "proj_out")
        layer = "attn_layers.layers.*.fn."
        return (
            {"token_emb": "embedding_rowwise"}
            | dict.fromkeys((layer + name for name in by_rows), "colwise")
            | dict.fromkeys((layer + name for name in by_columns), "rowwise")
        )

    def validate_architecture(self) -> None:
        """Refuse the arguments that the model's constructor refuses. transformers calls it for every new config."""
        from andromeda.config import ModelConfig

        if self.num_key_value_heads not in (1, self.num_attention_heads):
            raise ValueError(
                f"AndromedaConfig: num_key_value_heads must be 1 or num_attention_heads ({self.num_attention_heads}), "
                f"got {self.num_key_value_heads}"
            )
        ModelConfig(**self.to_arguments())

    def to_dict(self) -> dict[str, Any]:
        """See transformers. PEFT calls this right before it looks for the default target modules of a method."""
        peft_defaults.register(self.model_type)
        return super().to_dict()

    def to_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `andromeda.Andromeda` for the same model.

        With `attn_implementation="eager"`, which transformers does not save, `attn_flash` is False.
        """
        arguments = {ours: getattr(self, theirs) for ours, theirs in _NAMES.items()}
        arguments |= {name: getattr(self, name) for name in _SWITCHES}
        if getattr(self, "_attn_implementation_internal", None) == "eager":
            arguments["attn_flash"] = False
        return arguments | {"attn_one_kv_head": self.num_key_value_heads == 1}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], **options: Any) -> "AndromedaConfig":
        """The config of a model from the keyword arguments of `andromeda.Andromeda`.

        options: arguments that only transformers has, such as `use_cache` or `eos_token_id`.
        """
        values = {theirs: arguments[ours] for ours, theirs in _NAMES.items()}
        values |= {name: arguments[name] for name in _SWITCHES}
        heads = arguments["heads"]
        return cls(**values, num_key_value_heads=1 if arguments["attn_one_kv_head"] else heads, **options)


__all__ = ["AndromedaConfig"]
