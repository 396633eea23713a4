"""Andromeda for transformers: the model without a head, with the next token's logits, and with the classifiers.

Every class has the parameter names of `andromeda.Andromeda`, so that a conversion between the two copies nothing:

        AndromedaModel                        token_emb, pos_emb, attn_layers      -> last_hidden_state
        AndromedaForCausalLM                  transformer: those and to_logits     -> logits, loss
        AndromedaForSequenceClassification    transformer: those; score            -> a score per row
        AndromedaForTokenClassification       transformer: those; score            -> a score per token
"""

import dataclasses
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, initialization
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from typing_extensions import Self

from andromeda import checkpoint
from andromeda.config import DecoderConfig, KeyStart, ModelConfig, read_key_start
from andromeda.generation import Cache, FixedCache
from andromeda.huggingface import attention_masks
from andromeda.huggingface.cache_andromeda import AndromedaCache, AndromedaStaticCache, state_of
from andromeda.huggingface.checked_loading import CheckedLoading
from andromeda.huggingface.configuration_andromeda import AndromedaConfig
from andromeda.huggingface.generation_andromeda import AndromedaGenerationMixin
from andromeda.huggingface.outputs import TrainingOutput, UnreadLogits
from andromeda.huggingface.saving import ModelSaving, is_tied
from andromeda.model import (
    Andromeda,
    Backbone,
    Decoder,
    Sublayer,
    TransformerWrapper,
    cross_entropy,
    draw,
    have_values,
    is_tracing,
    keeps_all,
    kept_positions,
    new_linear,
    undrawn,
)

logger = logging.get_logger(__name__)

_IGNORE_INDEX = -100
_TIES = {"transformer.to_logits.weight": "transformer.token_emb.weight"}

# Keywords that callers of transformers pass to any model and that change nothing here, with the reason.
IGNORED_KEYWORDS = {
    "cache_position": "the cache counts its tokens itself",
    "cu_seq_lens_k": "queries and keys are the same tokens: cu_seq_lens_q says it",
    "margin": "it belongs to the loss of a reward trainer",
    "max_length_k": "the documents are known",
    "max_length_q": "the documents are known",
    "num_items_in_batch": "it belongs to the loss",
    "return_dict": "None is the default",
    "token_type_ids": "there is one kind of token",
    "tokenizer": "it belongs to the stopping criteria of generate",
}
# Keywords that ask for what this model does not have, and the values that ask for nothing.
_REFUSED_KEYWORDS: dict[str, tuple[tuple[object, ...], str]] = {
    "head_mask": ((None,), "the kernels compute all heads"),
    "is_causal": ((None, True), "the model is causal"),
    "output_router_logits": ((None, False), "there are no experts"),
}

# Values of `attn_implementation`, and what computes then.
ATTENTIONS = {
    "andromeda": "the fused kernels, the default",
    "sdpa": "the same, for recipes that ask for fused attention",
    "eager": "plain torch",
}


def _check_keywords(owner: str, keywords: dict[str, Any]) -> None:
    """Refuse keywords that nobody knows: a misspelt one would be ignored in silence."""
    for name, value in keywords.items():
        if name in _REFUSED_KEYWORDS:
            allowed, reason = _REFUSED_KEYWORDS[name]
            if not any(value is one for one in allowed):
                raise ValueError(f"{owner}: {name} must be {' or '.join(map(str, allowed))}, since {reason}")
        elif name not in IGNORED_KEYWORDS:
            raise TypeError(
                f"{owner}: unexpected keyword {name!r}; beside the named arguments these are accepted and change "
                f"nothing: {', '.join(IGNORED_KEYWORDS)}"
            )


class AndromedaPreTrainedModel(CheckedLoading, ModelSaving):
    """What all classes share."""

    config: AndromedaConfig
    config_class = AndromedaConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses of the classifiers do not know num_items_in_batch
    _no_split_modules = ["Sublayer"]  # noqa: RUF012 - transformers declares it so
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _input_embed_layer = "token_emb"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters of a module as docs/model.md#11 says.

        transformers calls this for each module of a new model, and after loading for each that lacks a parameter; it
        guards those that are loaded.
        """
        if not draw(cast(AndromedaModel, self.base_model), module):
            super()._init_weights(module)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The name of the attention that runs, see `ATTENTIONS`; transformers asks for each new model and each change.

        requested_attention: None is "andromeda", or "eager" with `attn_flash=False`.
        """
        owner, flash = type(self).__name__, self.config.attn_flash
        name = requested_attention or ("andromeda" if flash else "eager")
        if name not in ATTENTIONS:
            known = ", ".join(f'"{known}" ({meaning})' for known, meaning in ATTENTIONS.items())
            raise ValueError(
                f'{owner}: attn_implementation must be one of {known}, got "{name}": ALiBi and xPos of this model are '
                "in its own kernels"
            )
        if name != "eager" and not flash:
            raise ValueError(f'{owner}: attn_implementation must be "eager" where attn_flash is False, got "{name}"')
        if name == "sdpa":
            logger.warning_once(
                'Andromeda: attn_implementation="sdpa" runs the fused kernels of Andromeda, as the default does'
            )
        return name

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], allow_all_kernels: bool = False
    ) -> None:
        """See transformers. The names are those of `ATTENTIONS`."""
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        flash: bool = self.config.to_arguments()["attn_flash"]
        for module in self.modules():
            if isinstance(settings := getattr(module, "config", None), DecoderConfig):
                module.config = dataclasses.replace(settings, attn_flash=flash)  # type: ignore[assignment]

    def _set_gradient_checkpointing(self, *args: Any, every_n_layers: int = 1, **kwargs: Any) -> None:
        """See `activation_checkpointing_enable`. Every n-th block is checkpointed, which is two sub-layers."""
        if every_n_layers < 1:
            raise ValueError(f"{type(self).__name__}: every_n_layers must be at least 1, got {every_n_layers}")
        super()._set_gradient_checkpointing(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, Sublayer) and module.index // 2 % every_n_layers:
                module.gradient_checkpointing = False


class AndromedaModel(AndromedaPreTrainedModel, Backbone):
    """Embedding and decoder: from token ids to the vectors of which a head makes logits or scores.

    Args:
        config: sizes and switches. The new modules are initialised as in docs/model.md#11.
    """

    _keys_to_ignore_on_load_unexpected = [r"(^|\.)to_logits\.weight$", r"^score\.(weight|bias)$"]  # noqa: RUF012

    def __init__(self, config: AndromedaConfig):
        super().__init__(config)
        arguments = ModelConfig(**config.to_arguments())
        with undrawn():  # `post_init` draws
            self.build(
                num_tokens=arguments.num_tokens,
                max_seq_len=arguments.max_seq_len,
                attn_layers=Decoder(**arguments.decoder_arguments()),
                use_abs_pos_emb=arguments.use_abs_pos_emb,
            )
        self.post_init()

    @torch.no_grad()
    @initialization.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        """See transformers. The decoder comes first, as in `andromeda.Andromeda`: one seed gives the same weights."""
        self.attn_layers.apply(lambda module: self._initialize_weights(module, self.is_custom_code()))
        super().initialize_weights()

    @classmethod
    def of_wrapper(cls, config: AndromedaConfig, wrapper: TransformerWrapper) -> Self:
        """The children of a `TransformerWrapper` with this interface: the dictionary of children is shared."""
        model = cls.__new__(cls)
        super(AndromedaModel, model).__init__(config)
        model.max_seq_len = wrapper.max_seq_len
        model.__dict__["_modules"] = wrapper._modules
        model.__dict__["_wrapper"] = wrapper
        model.training = wrapper.training
        for module in model.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # nothing is drawn again
        model.post_init()
        return model

    @property
    def wrapper(self) -> TransformerWrapper:
        """The `TransformerWrapper` with the same children, among them `to_logits`, which only a causal model has."""
        held: TransformerWrapper | None = self.__dict__.get("_wrapper")
        if held is None or held._modules is not self._modules:  # or this is a shallow copy, such as a replica
            held = self.__dict__["_wrapper"] = TransformerWrapper.of_modules(self._modules, self.max_seq_len)
        return held

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        key_start: KeyStart = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **keywords: Any,
    ) -> BaseModelOutputWithPast:
        """The output of the last block, after the last norm.

        Args:
            input_ids: int64 or int32 (batch, seqlen).
            attention_mask: (batch, tokens in the cache + seqlen), 0 for padding; or (batch, 1, seqlen, tokens in the
                cache + seqlen), bool or additive, if each token sees an interval of tokens that ends with itself. With
                a cache the mask of the first call counts, whose padding must not be on the right; later tokens are
                real.
            position_ids: (batch, seqlen). A document begins where they do not go on by one: packed rows. The positions
                of this model are relative, so that nothing else about them matters; with `use_abs_pos_emb` they are the
                rows of the table. Beside a mask with padding between tokens they must be those of one document.
            past_key_values: the cache that an earlier call returned; this call extends it.
            inputs_embeds: (batch, seqlen, hidden_size), in place of input_ids.
            use_cache: return a cache. Default: `config.use_cache` where no gradient is recorded and no program traced.
            key_start: (batch, seqlen) int32, in place of mask and documents, those in position_ids included; see
                `TransformerWrapper.forward`.
            output_hidden_states: also return the embedding, the stream after each block but the last, and the result.
            output_attentions: also return the weights (batch, num_heads, seqlen, tokens) of each block. Attention is
                then computed in plain torch, which holds all of them.
            cu_seq_lens_q: (documents + 1,), the cumulative lengths of packed documents, for a batch of one row.
            seq_idx: (batch, seqlen), the number of each token's packed document.
            **keywords: those in `IGNORED_KEYWORDS`; return_dict=False gives a tuple.

        Raises:
            TypeError, ValueError: an argument is wrong, or asks for what this model does not have; names it.
        """
        owner = "AndromedaModel"
        _check_keywords(owner, keywords)
        if keywords.get("cu_seq_lens_k") is not None and cu_seq_lens_q is None and position_ids is None:
            raise ValueError(f"{owner}: cu_seq_lens_q must be given with cu_seq_lens_k, got None")
        x = self._embeddings(owner, input_ids, inputs_embeds)
        batch, n, _ = x.shape
        settings = self.attn_layers.config
        state = state_of(owner, past_key_values, settings.depth, settings.num_kv_heads, settings.dim_head)
        cache = state
        if isinstance(state, AndromedaStaticCache):
            new_mask = attention_mask is not None and not state.mask_is_read and not is_tracing()
            cache = state.for_call(n, new_mask)
        if use_cache and cache is None and self.attn_layers.checkpoints_now:
            logger.warning_once(f"{owner}: use_cache is False with gradient checkpointing, which runs each layer twice")
            use_cache = False
        wanted = use_cache
        if wanted is None:
            wanted = self.config.use_cache and not torch.is_grad_enabled() and not is_tracing()
        positions = None if self.pos_emb is None or position_ids is None else position_ids.to(x.device)
        order, padded_right = None, False
        if isinstance(cache, FixedCache):
            known = attention_mask is None or getattr(state, "mask_is_read", False)
            if key_start is not None or not known:
                raise ValueError(
                    f"{owner}: attention_mask and key_start must be given with the prompt where the cache is static, "
                    "got one with a later token"
                )
        if key_start is not None:
            others = {"attention_mask": attention_mask, "seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q}
            for name, given in others.items():
                if given is not None:
                    raise ValueError(f"{owner}: {name} and key_start must not both be given")
            starts = read_key_start(owner, key_start, batch, n, x.device)
        else:
            # On a GPU a read stalls the host, which matters in a training step and for each token of a text. Virtual
            # tokens before padding, of which embeddings may consist, are worth it.
            is_first = cache is None or cache.position == 0
            is_step = torch.is_grad_enabled() and not wanted and inputs_embeds is None
            check = not is_tracing() and (x.is_cpu or (is_first and not is_step))
            visibility = self._visibility(
                attention_mask, position_ids, seq_idx, cu_seq_lens_q, batch, n, cache, check=check
            )
            starts, order = visibility.key_start, visibility.order
            starts = None if starts is None else starts.to(x.device)
            padded_right = visibility.padded_right
            if padded_right and (use_cache or (cache is not None and not getattr(cache, "is_prefix", False))):
                raise ValueError(
                    f"{owner}: attention_mask must have its padding on the left where a cache is used, got padding on "
                    'the right; set tokenizer.padding_side = "left"'
                )
            wanted = wanted and not padded_right
        if cache is None and wanted:
            past_key_values = cache = AndromedaCache()

        hidden_states: list[torch.Tensor] | None = [] if _wants(output_hidden_states, self, "hidden_states") else None
        attentions: list[torch.Tensor] | None = [] if _wants(output_attentions, self, "attentions") else None
        if order is not None:
            index = order.to(x.device)[..., None].expand_as(x)
            x = x.gather(1, index)
            positions = None
        features = self.decode(
            x, key_start=starts, cache=cache, positions=positions, hidden_states=hidden_states, attentions=attentions
        )
        if isinstance(cache, AndromedaCache):  # now, because a call that fails leaves the cache as it was
            cache.mask_is_read = cache.mask_is_read or attention_mask is not None
            cache.is_closed = cache.is_closed or padded_right
        if order is not None:
            features, *rest = (
                torch.zeros_like(states).scatter(1, index, states) for states in (features, *(hidden_states or ()))
            )
            hidden_states = rest if hidden_states is not None else None
            if attentions is not None:
                attentions = [_unordered(weights, order.to(x.device)) for weights in attentions]
        return BaseModelOutputWithPast(
            last_hidden_state=features,
            past_key_values=past_key_values,  # type: ignore[arg-type]  # a Cache of this package, too
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            attentions=None if attentions is None else tuple(attentions),
        )

    def _embeddings(
        self, owner: str, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """(batch, seqlen, hidden_size)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{owner}: one of input_ids and inputs_embeds must be given, got both or neither")
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
                raise ValueError(
                    f"{owner}: inputs_embeds must have shape (batch, seqlen, hidden_size = {self.config.hidden_size}), "
                    f"got {tuple(inputs_embeds.shape)}"
                )
            if 0 in inputs_embeds.shape:
                raise ValueError(
                    f"{owner}: inputs_embeds must hold at least one token, got {tuple(inputs_embeds.shape)}"
                )
            return inputs_embeds
        assert input_ids is not None
        # Under tensor parallelism a table may have only the rows of this process.
        rows = max(getattr(self.token_emb, "num_embeddings", 0), self.config.vocab_size)
        return self.embed(_checked_ids(owner, input_ids, rows))

    def _visibility(
        self,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        cu_seq_lens: torch.Tensor | None,
        batch: int,
        n: int,
        cache: Cache | None,
        *,
        check: bool,
    ) -> attention_masks.Visibility:
        if isinstance(cache, FixedCache):
            return attention_masks.Visibility()  # the first call had the mask
        past = 0 if cache is None else cache.position
        known = past > 0 and getattr(cache, "mask_is_read", False)
        after_prefix = getattr(cache, "is_prefix", False)
        check = check or (after_prefix and not is_tracing())
        found = attention_masks.Visibility()
        if mask is not None and mask.ndim == 2 and known and check and mask.shape[1] == past + n:
            known = bool(mask[:, past:].all())  # or more of the padding on the left comes now
        if mask is not None and not (known and mask.ndim == 2):
            found = attention_masks.read_mask(mask, batch, n, past, check=check)
        if found.order is not None:
            if seq_idx is not None or cu_seq_lens is not None:
                attention_masks.refuse_documents("seq_idx" if cu_seq_lens is None else "cu_seq_lens_q")
            if position_ids is not None:
                attention_masks.check_one_document(position_ids.to(found.order.device), found)
            return found
        starts = found.key_start
        documents = None
        if position_ids is not None:
            documents = attention_masks.read_positions(position_ids, batch, n, past, check=check)
        if seq_idx is not None:
            given = attention_masks.read_documents(seq_idx, batch, n, past, check=check)
            documents = attention_masks.both(documents, given)
        if cu_seq_lens is not None:
            given = attention_masks.read_lengths(cu_seq_lens, batch, n, past, check=check)
            documents = attention_masks.both(documents, given)
        if documents is not None and after_prefix:
            raise ValueError(
                "AndromedaModel: position_ids, seq_idx and cu_seq_lens_q must describe one document per row after a "
                "learned prefix, which no other document of the row would see, got packed documents; leave packing out"
            )
        if documents is not None and cache is not None and cache.key_start is not None and starts is None:
            starts = cache.key_start[:, None].expand(batch, n)
        return found._replace(key_start=attention_masks.both(starts, documents))


class AndromedaForCausalLM(AndromedaPreTrainedModel, AndromedaGenerationMixin):
    """An Andromeda model with the interface of transformers.

    `model.transformer` is an `AndromedaModel` with one more child, `to_logits`; `model.transformer.wrapper` is the
    `TransformerWrapper` with the same children, that of `andromeda.Andromeda`.

        model = AndromedaForCausalLM(AndromedaConfig(hidden_size=256, ...))
        model = AndromedaForCausalLM.from_andromeda(andromeda_model)   # the same parameters
        model = AndromedaForCausalLM.from_pretrained("path/to/model", dtype=torch.bfloat16)

    Args:
        config: sizes and switches.
        transformer: the modules to use. Default: new ones, initialised as in docs/model.md#11.
    """

    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    _tied_weights_keys = _TIES  # with config.tie_word_embeddings
    _tp_plan = {"transformer.to_logits": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"transformer.to_logits": "keep_full_weight"}  # noqa: RUF012
    transformer: AndromedaModel

    def __init__(self, config: AndromedaConfig, transformer: TransformerWrapper | None = None):
        super().__init__(config)
        if transformer is None:
            self.transformer = AndromedaModel(config)
            with undrawn():
                self.transformer.to_logits = new_linear(config.hidden_size, config.vocab_size)
        else:
            if config.tie_word_embeddings and not is_tied(transformer):  # tying would overwrite its projection
                raise ValueError(
                    "AndromedaForCausalLM: config.tie_word_embeddings must be False for a transformer whose projection "
                    "is its own"
                )
            config.tie_word_embeddings = is_tied(transformer)
            self.transformer = AndromedaModel.of_wrapper(config, transformer)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transformer" and isinstance(value, TransformerWrapper):
            value = AndromedaModel.of_wrapper(self.config, value)
        super().__setattr__(name, value)

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
            model = Andromeda(**dataclasses.asdict(self.transformer.wrapper.config))
        model.transformer = self.transformer.wrapper
        return model.train(self.training)

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

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        key_start: KeyStart = None,
        skip_logits: bool | None = None,
        **keywords: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with labels the loss of docs/model.md#9.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, key_start, **keywords: see
                `AndromedaModel.forward`.
            labels: int64 (batch, seqlen), not shifted: position t is predicted at t - 1; -100 does not count.
            use_cache: return a cache. Default: `config.use_cache` where no gradient is recorded and labels are absent.
            logits_to_keep: logits only of this number of last tokens (0: all), or only of the positions in a
                one-dimensional integer tensor.
            shift_labels: by name, in place of labels, already shifted: entry t is predicted at t.
            num_items_in_batch: divisor of the sum of the losses, when several batches share one mean (gradient
                accumulation). Default: the number of labels that count.
            skip_logits: with labels, leave the logits out, which are the largest tensor of a training step: the loss
                does not need them. Default: in training mode where gradients are recorded they are computed if
                somebody reads them (`outputs.TrainingOutput`), and left out in a traced program.

        Returns:
            `CausalLMOutputWithPast`: loss, logits (batch, seqlen or the number of positions kept, vocab_size) or None,
            past_key_values, hidden_states, attentions.
        """
        owner = "AndromedaForCausalLM"
        # Not in the signature: Trainer evaluates only batches that have every argument with "label" in its name.
        shift_labels = keywords.pop("shift_labels", None)
        if labels is not None and shift_labels is not None:
            labels = None  # some trainers pass both
        has_labels = labels is not None or shift_labels is not None
        if has_labels and not keeps_all(logits_to_keep):
            raise ValueError(f"{owner}: logits_to_keep must be left out with labels")
        if skip_logits and not has_labels:
            raise ValueError(f"{owner}: skip_logits must be left out without labels")
        later = skip_logits is None and has_labels and self.training and torch.is_grad_enabled()
        if use_cache is None and has_labels:
            use_cache = False
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            key_start=key_start,
            return_dict=True,
            **keywords,
        )
        features = output.last_hidden_state
        logits: Any = None
        if not (skip_logits or later):
            logits = self.transformer.to_logits(kept_positions(owner, features, logits_to_keep))
        loss = None
        if has_labels:
            loss = self._loss(features, logits, labels, shift_labels, num_items_in_batch)
        kind: type[CausalLMOutputWithPast] = CausalLMOutputWithPast
        if later and not is_tracing():
            kind, logits = TrainingOutput, UnreadLogits(self.transformer.to_logits, features)
        return kind(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _loss(
        self,
        features: torch.Tensor,
        logits: torch.Tensor | None,
        labels: torch.Tensor | None,
        targets: torch.Tensor | None,
        count: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss of features (batch, seqlen, dim), whose logits are given or not needed; one of labels, targets."""
        name, given = ("shift_labels", targets) if labels is None else ("labels", labels)
        assert given is not None
        if given.shape != features.shape[:2]:
            raise ValueError(
                f"AndromedaForCausalLM: {name} must have the shape of input_ids, got {tuple(given.shape)} and "
                f"{tuple(features.shape[:2])}"
            )
        if labels is not None:
            # The labels are shifted, because shifting the logits would copy the largest tensor of a training step.
            targets = functional.pad(labels, (0, 1), value=_IGNORE_INDEX)[:, 1:]
        assert targets is not None
        if isinstance(count, torch.Tensor):
            count = count.to(features.device)
        if logits is None:
            return self.transformer.loss(features, targets.to(features.device), ignore_index=_IGNORE_INDEX, count=count)
        targets = targets.to(logits.device)
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORE_INDEX, count=count)

    def get_output_embeddings(self) -> nn.Module:
        """See transformers."""
        return self.transformer.to_logits

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """See transformers."""
        self.transformer.to_logits = new_embeddings


def _checked_ids(owner: str, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
        found = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"{owner}: input_ids must be an int64 or int32 tensor, got {found}")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"{owner}: input_ids must have shape (batch, seqlen) and hold at least one token, got {tuple(ids.shape)}"
        )
    if ids.device.type == "cpu" and have_values(ids):
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{owner}: input_ids must be at least 0 and below the vocabulary size {vocab_size}, got "
                f"{low if low < 0 else high}"
            )
    return ids


def _wants(argument: bool | None, model: PreTrainedModel, name: str) -> bool:
    return getattr(model.config, f"output_{name}", False) if argument is None else argument


def _unordered(weights: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Attention weights (batch, num_heads, n, n) of tokens that were processed in `order`, in the caller's order."""
    inverse = order.argsort(1)
    rows = weights.gather(2, inverse[:, None, :, None].expand_as(weights))
    return rows.gather(3, inverse[:, None, None, :].expand_as(weights))


class AndromedaForSequenceClassification(GenericForSequenceClassification, AndromedaPreTrainedModel):
    """A score per class from the last real token of each row: classifiers and reward models."""

    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected = [r"\.to_logits\.weight$"]  # noqa: RUF012


class AndromedaForTokenClassification(GenericForTokenClassification, AndromedaPreTrainedModel):
    """A score per class from each token."""

    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected = [r"\.to_logits\.weight$"]  # noqa: RUF012


__all__ = [
    "IGNORED_KEYWORDS",
    "AndromedaCache",
    "AndromedaForCausalLM",
    "AndromedaForSequenceClassification",
    "AndromedaForTokenClassification",
    "AndromedaModel",
    "AndromedaPreTrainedModel",
]
