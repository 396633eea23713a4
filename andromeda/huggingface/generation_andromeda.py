"""`AndromedaGenerationMixin`: transformers' `generate` for a model whose cache is `AndromedaCache`."""

import contextvars
from typing import Any, NoReturn

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.candidate_generator import AssistedCandidateGenerator, CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode

from andromeda.generation import Cache
from andromeda.huggingface.cache_andromeda import AndromedaCache, AndromedaStaticCache, state_of

# Values of `cache_implementation` that are refused, with the reason.
_REFUSED_CACHES = {
    "offloaded": "keys and values stay on the device of the model, and are small with one key head",
    "quantized": "keys are stored with factors of very different sizes, which eight bits cannot hold",
    "hybrid": "there are no layers with another window",
    "sliding": "there are no layers with another window",
    "paged": "there is no paged attention; pad the prompts on the left",
}


# Not an attribute of the model, which other threads use at the same time.
_draft_blocks: contextvars.ContextVar[int | None] = contextvars.ContextVar("draft_blocks", default=None)


class AndromedaGenerationMixin(GenerationMixin):
    """What differs from transformers: the caches that `generate` makes, and what it refuses."""

    _is_stateful = False  # the cache can go back

    def _state(self, past_key_values: object) -> Cache | None:
        """The cache of this package that `past_key_values` is or holds."""
        config: Any = self.transformer.attn_layers.config  # type: ignore[attr-defined]
        return state_of(type(self).__name__, past_key_values, config.depth, config.num_kv_heads, config.dim_head)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        wanted = kwargs.get("cache_implementation", getattr(generation_config, "cache_implementation", None))
        if wanted == "hybrid":  # transformers would take it for None
            self._refuse_cache(wanted)
        inherited: Any = super()
        prepared: tuple[GenerationConfig, dict[str, Any]] = inherited._prepare_generation_config(
            generation_config, **kwargs
        )
        return prepared

    def _refuse_cache(self, wanted: object) -> NoReturn:
        reason = next((reason for name, reason in _REFUSED_CACHES.items() if str(wanted).startswith(name)), "")
        raise ValueError(
            f'{type(self).__name__}: cache_implementation must be "dynamic" or "static", got {wanted!r}: {reason}'
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        wanted = generation_config.cache_implementation
        given = model_kwargs.get("past_key_values")
        if given is not None:
            if isinstance(given, Cache) and not isinstance(given, AndromedaCache):
                raise TypeError(
                    f"{type(self).__name__}: past_key_values must be an AndromedaCache in generate, got a "
                    f"{type(given).__name__}"
                )
            inherited: Any = super()
            inherited._prepare_cache_for_generation(  # refuses both
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            self._state(given)
        elif generation_config.use_cache is False:
            return None
        elif wanted in (None, "dynamic"):
            model_kwargs["past_key_values"] = AndromedaCache()
        elif wanted == "static":
            length = max(max_cache_length, generation_config.max_cache_len or 0)
            # The same size in later calls is the same program.
            length = max(length, getattr(self, "_previous_max_cache_length", 0))
            self._check_absolute_positions(length)
            self._previous_max_cache_length = length
            model_kwargs["past_key_values"] = AndromedaStaticCache(length)
        else:
            self._refuse_cache(wanted)
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()
            if given is None:
                model_kwargs["past_key_values"].blocks = _draft_blocks.get()
        return None

    def _check_absolute_positions(self, length: int) -> None:
        transformer: Any = self.transformer  # type: ignore[attr-defined]
        if transformer.pos_emb is not None and length > transformer.max_seq_len:
            raise ValueError(
                f'{type(self).__name__}: cache_implementation "static" must end before position '
                f"{transformer.max_seq_len} of the absolute position table, got a cache of {length} tokens; generate "
                "fewer"
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See transformers. With a static cache the mask is given once, and nothing else grows from call to call."""
        inherited: Any = super()
        inputs: dict[str, Any] = inherited.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        state = self._state(past_key_values)
        if isinstance(state, AndromedaCache) and is_first_iteration:
            state.mask_is_read = False  # a part of a prompt may be nothing but padding
        if isinstance(state, AndromedaStaticCache):
            tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            state.prepare(tokens.shape[1], bool(is_first_iteration))
        return inputs

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> torch.Tensor | None:
        """The mask of a call with a static cache: that of the prompt is enough."""
        return attention_mask if is_first_iteration else None

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Any:
        """The mask where the caller gives none: padding is guessed for the first tokens alone, not for a draft's."""
        cache = model_kwargs.get("past_key_values")
        if generation_config.is_assistant or (cache is not None and cache.get_seq_length() > 0):
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        inherited: Any = super()
        return inherited._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """No positions: the cache and the mask say all about them."""

    def _get_candidate_generator(  # type: ignore[override]  # transformers passes keywords
        self, generation_config: GenerationConfig, **kwargs: Any
    ) -> CandidateGenerator:
        inherited: Any = super()
        blocks = generation_config.assistant_early_exit
        if blocks is None:
            generator: CandidateGenerator = inherited._get_candidate_generator(
                generation_config=generation_config, **kwargs
            )
            return generator
        depth = self.transformer.attn_layers.config.depth  # type: ignore[attr-defined]
        if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks < depth:
            raise ValueError(
                f"{type(self).__name__}: assistant_early_exit must be a number of blocks from 1 to {depth - 1}, got "
                f"{blocks!r}"
            )
        names = ("input_ids", "model_kwargs", "inputs_tensor", "logits_processor")
        return _EarlyExit(self, generation_config, **{name: kwargs[name] for name in names})

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it needs a paged cache."""
        self._refuse_continuous_batching("init_continuous_batching")

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it needs a paged cache."""
        self._refuse_continuous_batching("generate_batch")

    def _refuse_continuous_batching(self, method: str) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__}: {method} must not be called: continuous batching keeps the keys of all requests "
            "in pages, and an Andromeda model has no paged attention; call generate on prompts that are padded on the "
            "left"
        )


class _EarlyExit(AssistedCandidateGenerator):
    """Drafts of the model itself, of whose blocks only the first ones run."""

    def __init__(self, model: Any, generation_config: GenerationConfig, **kwargs: Any):
        super().__init__(assistant_model=model, generation_config=generation_config, **kwargs)
        self._blocks = self.generation_config.assistant_early_exit
        self.generation_config.assistant_early_exit = None  # the draft itself has no assistant

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """See transformers."""
        inherited: Any = super()
        token = _draft_blocks.set(self._blocks)  # the cache of the drafts is made inside, and keeps it
        try:
            return inherited.get_candidates(input_ids, **kwargs)
        finally:
            _draft_blocks.reset(token)


__all__ = ["AndromedaGenerationMixin"]
