"""`AndromedaForCausalLM`: Andromeda for transformers' `generate`, `Trainer`, `save_pretrained` and `from_pretrained`.

It wraps the same `TransformerWrapper` that `andromeda.Andromeda` holds, with the same parameter names, so that a
conversion between the two copies nothing.
"""

import dataclasses
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import Self

from andromeda import checkpoint
from andromeda.config import KeyStart, ModelConfig
from andromeda.generation import Cache
from andromeda.huggingface.configuration_andromeda import AndromedaConfig
from andromeda.model import (
    Andromeda,
    Decoder,
    TransformerWrapper,
    cross_entropy,
    draw,
    have_values,
    keeps_all,
    kept_positions,
)

_IGNORE_INDEX = -100
_TIES = {"transformer.to_logits.weight": "transformer.token_emb.weight"}


class AndromedaCache(Cache):
    """`andromeda.generation.Cache` with the two methods that transformers' `generate` calls."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens processed."""
        return self.position


class AndromedaForCausalLM(PreTrainedModel, GenerationMixin):
    """An Andromeda model with the interface of transformers.

    `model.transformer` is the `TransformerWrapper` of `andromeda.Andromeda`.

        model = AndromedaForCausalLM(AndromedaConfig(hidden_size=256, ...))
        model = AndromedaForCausalLM.from_andromeda(andromeda_model)   # the same parameters
        model = AndromedaForCausalLM.from_pretrained("path/to/model", dtype=torch.bfloat16)

    Args:
        config: sizes and switches.
        transformer: the modules to use. Default: new ones, initialised as in docs/model.md#11.
    """

    config: AndromedaConfig
    config_class = AndromedaConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    _no_split_modules = ["Sublayer"]  # noqa: RUF012 - transformers declares it so
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = _TIES  # with config.tie_word_embeddings
    _is_stateful = True  # refuses assisted generation, which would need the cache to go back

    def __init__(self, config: AndromedaConfig, transformer: TransformerWrapper | None = None):
        super().__init__(config)
        if transformer is not None:
            if config.tie_word_embeddings and not _is_tied(transformer):  # tying would overwrite its projection
                raise ValueError(
                    "AndromedaForCausalLM: config.tie_word_embeddings must be False for a transformer whose projection "
                    "is its own"
                )
            config.tie_word_embeddings = _is_tied(transformer)
        self.transformer = _new_transformer(config) if transformer is None else transformer
        self.post_init()

    @classmethod
    def from_andromeda(cls, model: Andromeda, **options: Any) -> Self:
        """The same model with this interface; the parameters are shared.

        options: see `AndromedaConfig.from_arguments`.
        """
        config = AndromedaConfig.from_arguments(dataclasses.asdict(model.config), **options)
        return cls(config, transformer=model.transformer).train(model.training)

    def to_andromeda(self) -> Andromeda:
        """The same model with the interface of `andromeda.Andromeda`; the parameters are shared."""
        with torch.device("meta"):  # the parameters made here are thrown away at once
            model = Andromeda(**dataclasses.asdict(self.transformer.config))
        model.transformer = self.transformer
        return model.train(self.training)

    @overload
    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self: ...

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self | tuple[Self, dict[str, Any]]:
        """See transformers; a checkpoint with missing, unexpected or misshapen parameters is a `ValueError` here.

        With `ignore_mismatched_sizes`, misshapen parameters are drawn again (docs/model.md#11). Warnings name them, and
        also weights that are not finite. Parts of names that come from wrappers are removed.
        """
        report = kwargs.pop("output_loading_info", False)
        kwargs["key_mapping"] = {checkpoint.WRAPPERS_PATTERN: r"\1"} | (kwargs.get("key_mapping") or {})
        ignored = {"mismatched_keys"} if kwargs.get("ignore_mismatched_sizes") else set()
        kwargs["ignore_mismatched_sizes"] = True  # transformers' own error does not name them
        _check_layers(*args, **kwargs)
        model: Self
        information: dict[str, Any]
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
            model, information = loaded
        except SafetensorError as error:
            raise ValueError(f"AndromedaForCausalLM: the weights must be a whole safetensors file: {error}") from error
        faults = [
            f"\n    {kind.removesuffix('_keys')}: {', '.join(sorted(map(str, information[kind])))}"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if information[kind] and kind not in ignored
        ]
        if faults:
            raise ValueError(f"AndromedaForCausalLM: the checkpoint must have the model's parameters{''.join(faults)}")
        drawn = sorted(name for name, *_ in information["mismatched_keys"])
        for name in drawn:
            draw(model.transformer, name.removeprefix("transformer."))
        if drawn:
            warnings.warn(
                f"AndromedaForCausalLM: {', '.join(drawn)} had other shapes in the checkpoint and were drawn anew; "
                "train the model before you use it",
                UserWarning,
                stacklevel=2,
            )
        not_finite = {name: p for name, p in model.named_parameters() if not checkpoint.is_finite(p)}
        checkpoint.warn_of_not_finite("AndromedaForCausalLM: the checkpoint", not_finite)
        return (model, information) if report else model

    def check_saveable(self, owner: str) -> None:
        """ValueError, in the name of `owner`, if a saved copy of this model could not be loaded again.

        The cause is a custom embedding, parameters without memory, or parameters that do not fit the config. Ties of
        parameters are not checked.
        """
        embedding = self.get_input_embeddings()
        if not checkpoint.is_plain_embedding(embedding):
            raise ValueError(f"{owner}, with the default embedding_provider, got a {type(embedding).__name__}")
        if without := [name for name, parameter in self.named_parameters() if parameter.is_meta]:
            raise ValueError(f"{owner}, with its parameters in memory, got {', '.join(without[:3])} on the meta device")
        with torch.device("meta"):
            fresh = AndromedaForCausalLM(self.config)
        expected = {name: tuple(value.shape) for name, value in fresh.state_dict().items()}
        found = {  # by the names in the checkpoint, without the parts of wrappers such as torch.compile
            checkpoint.plain_name(name, expected): tuple(value.shape) for name, value in self.state_dict().items()
        }
        if different := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
            lines = [f"\n    {name}: {expected.get(name)} expected, got {found.get(name)}" for name in different[:5]]
            raise ValueError(f"{owner}, with the parameters that its config describes, got others:{''.join(lines)}")

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """See transformers. A projection tied to the embedding stays tied; parts of wrappers in names are removed.

        Raises:
            ValueError: no config describes the model: it has a custom embedding, or other tied parameters.
        """
        owner = "AndromedaForCausalLM.save_pretrained"
        if not checkpoint.is_plain_embedding(self.transformer.token_emb):
            raise ValueError(
                f"{owner}: embedding_provider must be the default, which loading can make again, got a "
                f"{type(self.transformer.token_emb).__name__}; save state_dict() instead"
            )
        described, found = ModelConfig(**self.config.to_arguments()), self.transformer.config
        if described != found:
            ours, theirs = dataclasses.asdict(found), dataclasses.asdict(described)
            names = [name for name in ours if ours[name] != theirs[name]]
            raise ValueError(
                f"{owner}: config must describe the modules, which differ in {', '.join(names)}; make one by "
                "from_andromeda(model.to_andromeda())"
            )
        self.config.tie_word_embeddings = _is_tied(self.transformer)
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys()
        if len(args) < 2 and kwargs.get("state_dict") is None:
            state, problems = checkpoint.rename(self.state_dict(), (), owner)
            if problems:
                raise ValueError(f"{owner}: parameters must have different names\n" + "\n".join(problems))
            _, ties = checkpoint.apart(state, owner)
            others = [f"{name} and {first}" for name, first in ties.items() if _TIES.get(name) != first]
            if others:
                raise ValueError(
                    f"{owner}: parameters must not be one but for the projection and the embedding, got "
                    f"{', '.join(others)}; to_andromeda().save keeps them so"
                )
            kwargs["state_dict"] = state
        return super().save_pretrained(save_directory, *args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        key_start: KeyStart = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        skip_logits: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with `labels` the loss of docs/model.md#9.

        Args:
            input_ids: int64 (batch, seqlen).
            attention_mask: (batch, tokens in the cache + seqlen), 0 for padding, which must be on the left: it becomes
                `key_start`. Padding on the right needs no mask, since no real token sees it, and is accepted without a
                cache. Other masks are refused.
            past_key_values: the cache that an earlier call returned; this call extends it.
            labels: int64 (batch, seqlen), not shifted: position t is predicted at t - 1; -100 does not count.
            use_cache: return a cache. Default: `config.use_cache` where no gradient is recorded and labels are absent.
            logits_to_keep: logits only of this number of last tokens (0: all), or only of the positions in a
                one-dimensional integer tensor.
            key_start: (batch, seqlen) int32, in place of a mask; see `TransformerWrapper.forward`.
            num_items_in_batch: divisor of the sum of the losses, when several batches share one mean (gradient
                accumulation). Default: the number of labels that count.
            return_dict: False gives a tuple.
            output_attentions, output_hidden_states: must be off; the kernels do not keep them.
            skip_logits: with `labels`, leave the logits out, which are the largest tensor of a training step: the loss
                does not need them. Default: leave them out in training mode where gradients are recorded.

        Returns:
            `CausalLMOutputWithPast`: loss, logits (batch, seqlen or the number of positions kept, vocab_size) or None,
            past_key_values.
        """
        for name, value in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if value:
                raise ValueError(f"AndromedaForCausalLM: {name} must be False, the kernels do not keep them")
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            raise TypeError(
                "AndromedaForCausalLM: past_key_values must be a cache that this model returned, got "
                f"{type(past_key_values).__name__}"
            )
        if labels is not None and (past_key_values is not None or not keeps_all(logits_to_keep)):
            raise ValueError("AndromedaForCausalLM: past_key_values and logits_to_keep must be left out with labels")
        if skip_logits and labels is None:
            raise ValueError("AndromedaForCausalLM: skip_logits must be left out without labels")
        if skip_logits is None:
            skip_logits = labels is not None and self.training and torch.is_grad_enabled()
        wanted = self.config.use_cache and not torch.is_grad_enabled() and labels is None
        if attention_mask is not None:
            if key_start is not None:
                raise ValueError("AndromedaForCausalLM: attention_mask and key_start must not both be given")
            key_start, cacheable = _read_mask(attention_mask, input_ids, past_key_values)
            if not cacheable and (use_cache or past_key_values is not None):
                raise ValueError(
                    "AndromedaForCausalLM: attention_mask must have its padding on the left where a cache is used, got "
                    'padding on the right; set tokenizer.padding_side = "left"'
                )
            wanted = wanted and cacheable
        if past_key_values is None and (wanted if use_cache is None else use_cache):
            past_key_values = AndromedaCache()

        features = self.transformer.features(input_ids, key_start=key_start, cache=past_key_values)
        logits = loss = None
        if not skip_logits:
            logits = self.transformer.to_logits(kept_positions("AndromedaForCausalLM", features, logits_to_keep))
        if labels is not None:
            loss = self._loss(features, logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,  # type: ignore[arg-type]  # declared narrower than transformers needs
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(
        self,
        features: torch.Tensor,
        logits: torch.Tensor | None,
        labels: torch.Tensor,
        count: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss of features (batch, seqlen, dim), whose logits are given or not needed."""
        if labels.shape != features.shape[:2]:
            raise ValueError(
                f"AndromedaForCausalLM: labels must have the shape of input_ids, got {tuple(labels.shape)} and "
                f"{tuple(features.shape[:2])}"
            )
        # The labels are shifted, because shifting the logits would copy the largest tensor of a training step.
        targets = functional.pad(labels[:, 1:], (0, 1), value=_IGNORE_INDEX)
        if isinstance(count, torch.Tensor):
            count = count.to(features.device)
        if logits is None:
            return self.transformer.loss(features, targets.to(features.device), ignore_index=_IGNORE_INDEX, count=count)
        targets = targets.to(logits.device)
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORE_INDEX, count=count)

    def get_input_embeddings(self) -> nn.Module:
        """See transformers."""
        return self.transformer.token_emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        """See transformers."""
        self.transformer.token_emb = value

    def get_output_embeddings(self) -> nn.Module:
        """See transformers."""
        return self.transformer.to_logits

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """See transformers."""
        self.transformer.to_logits = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: every new module draws its own weights (docs/model.md#11), and `from_pretrained` accepts only
        checkpoints that hold all of them."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # so that `generate` lets `forward` make the cache

    @staticmethod
    def _reorder_cache(past_key_values: Cache, beam_idx: torch.Tensor) -> Cache:
        past_key_values.reorder(beam_idx)
        return past_key_values


def _is_tied(transformer: TransformerWrapper) -> bool:
    weight = getattr(transformer.to_logits, "weight", None)
    return weight is not None and weight is getattr(transformer.token_emb, "weight", None)


def _check_layers(*args: Any, **kwargs: Any) -> None:
    """Refuse a config of more layers than a local checkpoint has, before they are built."""
    name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    folder = Path(name or "", kwargs.get("subfolder") or "")
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not name or not (weights.is_file() or index.is_file()):
        return
    config = kwargs.get("config")
    if not isinstance(config, AndromedaConfig):
        if not (folder / "config.json").is_file():
            return
        options = {key: value for key, value in kwargs.items() if key in AndromedaConfig.__dataclass_fields__}
        config = AndromedaConfig.from_pretrained(folder, **options)
    owner = "AndromedaForCausalLM: the checkpoint must have the model's parameters"
    if weights.is_file():
        names: Iterable[str] = checkpoint.read_header(weights, "AndromedaForCausalLM")[0]
    else:
        names = checkpoint.names_in_index(index)
    shapes = {checkpoint.plain_name(name): None for name in names}
    checkpoint.check_layers(owner, ModelConfig(**config.to_arguments()), shapes)


def _new_transformer(config: AndromedaConfig) -> TransformerWrapper:
    arguments = ModelConfig(**config.to_arguments())
    return TransformerWrapper(
        num_tokens=arguments.num_tokens,
        max_seq_len=arguments.max_seq_len,
        attn_layers=Decoder(**arguments.decoder_arguments()),
        use_abs_pos_emb=arguments.use_abs_pos_emb,
    )


def _read_mask(mask: torch.Tensor, input_ids: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor | None, bool]:
    """`key_start` (batch, seqlen) that hides the same tokens as `mask`, or None, and whether a cache may follow."""
    batch, seqlen = input_ids.shape
    total = seqlen + (0 if cache is None else cache.position)
    if tuple(mask.shape) != (batch, total):
        raise ValueError(
            f"AndromedaForCausalLM: attention_mask must have shape (batch, cached tokens + seqlen) = {(batch, total)}, "
            f"got {tuple(mask.shape)}"
        )
    visible = mask.bool()
    if not have_values(visible):  # in a compiled program: the first real token, with padding on any side
        return visible.to(torch.int32).argmax(1, keepdim=True).to(torch.int32).expand(batch, seqlen), True
    real = visible.sum(1, keepdim=True)  # (batch, 1)
    token = torch.arange(total, device=mask.device)
    padding = total - real
    if torch.equal(visible, token >= padding):
        known = cache is not None and cache.key_start is not None
        if not known and bool((padding == 0).all()):
            return None, True
        return padding.to(torch.int32).expand(batch, seqlen), True
    if torch.equal(visible, token < real):
        return None, False
    raise ValueError(
        "AndromedaForCausalLM: attention_mask must be zeros and then ones in each row (padding on the left), or ones "
        "and then zeros; for packed documents pass key_start"
    )


__all__ = ["AndromedaCache", "AndromedaForCausalLM"]
