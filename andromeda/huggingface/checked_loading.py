"""`from_pretrained` with checks: what is damaged is refused, and what is drawn anew is named."""

import contextlib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, overload

from safetensors import SafetensorError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from andromeda import checkpoint
from andromeda.config import ModelConfig
from andromeda.huggingface.configuration_andromeda import AndromedaConfig
from andromeda.model import Attention

# Class -> the parameters that it adds to those of `AndromedaModel`.
_HEADS: dict[str, Collection[str]] = {
    "AndromedaModel": (),
    "AndromedaForCausalLM": ("transformer.to_logits.weight",),
    "AndromedaForSequenceClassification": ("score.weight",),
    "AndromedaForTokenClassification": ("score.weight", "score.bias"),
}
_ONLY_IN_HEADS = ("transformer.to_logits.", "score.")
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint does not have the model's parameters. transformers raises a `RuntimeError` for other shapes."""


class CheckedLoading(PreTrainedModel):
    """A base class of models whose `from_pretrained` accepts nothing silently."""

    @overload
    @classmethod
    def from_pretrained(
        cls, *args: Any, strict: bool | None = None, output_loading_info: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(cls, *args: Any, strict: bool | None = None, **kwargs: Any) -> Self: ...

    @classmethod
    def from_pretrained(
        cls, *args: Any, strict: bool | None = None, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """See transformers. Parameters that are not loaded have the distribution of a new model (docs/model.md#11).

        A class that adds a head loads the checkpoint of a class without it, and draws the head; a class without this
        head leaves it out. Parts of names that come from wrappers are removed.

        Args:
            strict: False draws all parameters that the checkpoint lacks, and leaves out what the model lacks. Default:
                True, but False if `state_dict` is given.
            ignore_mismatched_sizes: draw the parameters that have another shape in the checkpoint. Default: False.

        Raises:
            CheckpointError: parameters are missing, unexpected or misshapen, and no argument allows it; names them.
                It is a `ValueError` and a `RuntimeError`.
            ValueError: a file is damaged; or `tie_word_embeddings` is True, and the checkpoint has a projection that
                differs from the embedding.

        Warns:
            UserWarning: parameters were drawn, or left out, or are not finite; names them.
        """
        owner = cls.__name__
        wants_information = kwargs.pop("output_loading_info", False)
        kwargs["key_mapping"] = {checkpoint.WRAPPERS_PATTERN: r"\1"} | (kwargs.get("key_mapping") or {})
        any_shape = bool(kwargs.get("ignore_mismatched_sizes"))
        kwargs["ignore_mismatched_sizes"] = True  # transformers' own error does not name them
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if strict is None:
            strict = kwargs.get("state_dict") is None
        if strict:
            _check_layers(owner, name, kwargs)
        model: Self
        information: dict[str, Any]
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
            model, information = loaded
        except SafetensorError as error:
            raise ValueError(f"{owner}: the weights must be a whole safetensors file: {error}") from error
        _tell_mesh(model)
        found = model.__dict__.pop("_found_in_checkpoint", information)
        differences = _Differences(owner, found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
        heads = _new_heads(differences.missing, model, name, kwargs) if strict else set()
        differences.refuse(heads, strict, any_shape)
        if model.config.tie_word_embeddings and not _is_tied(model):
            raise ValueError(
                f"{owner}: tie_word_embeddings must be False for a checkpoint whose projection differs from its "
                "embedding, got True; to tie them afterwards set config.tie_word_embeddings and call tie_weights()"
            )
        for text in differences.warnings(heads, strict):
            warnings.warn(text, UserWarning, stacklevel=2)
        own = {key: p.to_local() if hasattr(p, "to_local") else p for key, p in model.named_parameters()}  # of a shard
        checkable = {key: p for key, p in own.items() if not is_traceable_wrapper_subclass(p)}  # else it is quantised
        not_finite = {key: p for key, p in checkable.items() if not checkpoint.is_finite(p)}
        checkpoint.warn_of_not_finite(f"{owner}: the checkpoint", not_finite)
        return (model, information) if wants_information else model

    @staticmethod
    def _finalize_model_loading(model: Any, *args: Any) -> Any:
        """Keeps what transformers found: where it then loads an adapter, it reports only on that."""
        found = PreTrainedModel._finalize_model_loading(model, *args)
        model.__dict__["_found_in_checkpoint"] = found.to_dict()
        return found


class _Differences:
    """Where a checkpoint differs from the model: names of parameters, and for other shapes also these."""

    def __init__(self, owner: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Collection[Any]):
        self.owner = owner
        self.missing, self.unexpected = set(missing), set(unexpected)
        self.shapes = {str(entry) for entry in mismatched}
        self.misshapen = {name for name, *_ in mismatched}

    def refuse(self, heads: set[str], strict: bool, any_shape: bool) -> None:
        """CheckpointError for the differences that the arguments of `from_pretrained` do not allow.

        heads: those of the missing parameters that may always be drawn.
        """
        faults: dict[str, set[str]] = {}
        remedies = []
        if strict and (self.missing - heads or self.unexpected):
            faults |= {"missing": self.missing - heads, "unexpected": self.unexpected}
            remedies.append("strict=False draws what is missing and leaves out what is unexpected")
        if self.misshapen and not any_shape:
            faults |= {"mismatched": self.shapes}
            remedies.append("ignore_mismatched_sizes=True draws what is mismatched")
        if faults:
            raise CheckpointError(
                f"{self.owner}: the checkpoint must have the model's parameters{_listed(faults)}\n"
                f"    to load it all the same: {', '.join(remedies)}"
            )

    def warnings(self, heads: set[str], strict: bool) -> Iterator[str]:
        """A text for each kind of difference that was allowed."""
        if self.misshapen:
            yield (
                f"{self.owner}: {', '.join(sorted(self.misshapen))} had other shapes in the checkpoint and were drawn "
                "anew; train the model before you use it"
            )
        if heads:
            yield (
                f"{self.owner}: {', '.join(sorted(heads))} is not in the checkpoint, which another class has saved, "
                "and was drawn anew; train the model before you use it"
            )
        if not strict and (self.missing or self.unexpected):
            kinds = {"missing, drawn anew": self.missing, "unexpected, left out": self.unexpected}
            yield f"{self.owner}: the checkpoint has other parameters than the model{_listed(kinds)}"


def _listed(kinds: dict[str, set[str]]) -> str:
    return "".join(f"\n    {kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names)


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the projection is the embedding, or there is none, or both are on the disk."""
    projection, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if projection is None or projection.weight.is_meta:
        return True
    return projection.weight is embedding.weight


def _tell_mesh(model: PreTrainedModel) -> None:
    """Tell attention which heads are in this process, where transformers has sharded quantised weights: these are no
    DTensors, which say it themselves."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
        return
    for module in model.modules():
        if isinstance(module, Attention):
            module.to_q._hf_device_mesh = mesh["tp"]


def _new_heads(missing: set[str], model: PreTrainedModel, name: Any, options: dict[str, Any]) -> set[str]:
    """Those of the missing parameters that no checkpoint of the class that saved this one has."""
    prefix = f"{model.base_model_prefix}."
    in_heads = {key for key in missing if key.startswith(_ONLY_IN_HEADS) or not key.startswith(prefix)}
    if not hasattr(model, model.base_model_prefix) or not in_heads:
        return set()
    values = {"architectures": model.config.architectures}
    with contextlib.suppress(OSError):  # it has none: an adapter, which names the model that it belongs to
        if name is not None:
            hub = {key: options[key] for key in _DOWNLOAD if key in options}
            values, _ = PreTrainedConfig.get_config_dict(name, **hub)
    architectures = values.get("architectures") or ["unknown"]
    return set.intersection(*(in_heads - {*_HEADS.get(saved, in_heads)} for saved in architectures))


def _renamed(key: str, mapping: dict[str, str]) -> str:
    """The name of a parameter after the substitutions of `key_mapping`."""
    for pattern, new in mapping.items():
        key = re.sub(pattern, new, key)
    return key


def _check_layers(owner: str, name: Any, options: dict[str, Any]) -> None:
    """Refuse a config of more layers than a local checkpoint has, before they are built."""
    folder = Path(name or "", options.get("subfolder") or "")
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not name or not (weights.is_file() or index.is_file()):
        return
    config = options.get("config")
    if not isinstance(config, AndromedaConfig):
        if not (folder / "config.json").is_file():
            return
        settings = {key: value for key, value in options.items() if key in AndromedaConfig.__dataclass_fields__}
        config = AndromedaConfig.from_pretrained(folder, **settings)
    if weights.is_file():
        names: Iterable[str] = checkpoint.read_header(weights, owner)[0]
    else:
        names = checkpoint.names_in_index(index)
    # Checkpoints of `AndromedaModel` have the same names without the first part.
    plain = (checkpoint.plain_name(_renamed(key, options["key_mapping"])) for key in names)
    shapes = {key if key.startswith("transformer.") else f"transformer.{key}": None for key in plain}
    arguments = ModelConfig(**config.to_arguments())
    checkpoint.check_layers(f"{owner}: the checkpoint must have the model's parameters", arguments, shapes)


__all__ = ["CheckedLoading", "CheckpointError"]
