"""Checkpoints: directories that `save` writes, and state dicts of every version of x-transformers (docs/model.md#12).

A saved model is a directory with `model.safetensors`, the parameters, and `andromeda.json`, the arguments of the
constructor. Nothing is unpickled.
"""

import collections
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from andromeda import files
from andromeda.config import EmbeddingProvider, ModelConfig

WEIGHTS = "model.safetensors"
SETTINGS = "andromeda.json"
FORMAT = 1
_DEFAULT_PROVIDER = "andromeda.model.AndromedaEmbedding"
_SEAL, _NO_SEAL = "checksum", "0" * 32  # in the metadata of the weights: XXH3-128 of the file, with this in its place
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Parts that wrappers insert anywhere in names: torch.compile, DistributedDataParallel, FSDP, activation checkpoints ...
_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "_forward_module")
)
# ... and the first parts of names in objects that hold a model, such as averages of weights.
_OWNERS = frozenset(("Andromeda", "decoder", "ema", "ema_model", "model", "net", "online_model"))
_COUNTERS = frozenset(("initted", "n_averaged", "step"))  # averages of weights keep them beside the weights


class Transformer(Protocol):
    """The parts of `andromeda.model.TransformerWrapper` that checkpoints know."""

    token_emb: torch.nn.Module

    @property
    def to_logits(self) -> torch.nn.Linear: ...


class Model(Protocol):
    """The parts of `andromeda.model.Andromeda` that checkpoints know."""

    embedding_provider: EmbeddingProvider

    def __init__(self, **arguments: Any) -> None: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def transformer(self) -> Transformer: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any: ...

    def get_submodule(self, target: str) -> torch.nn.Module: ...

    def get_parameter(self, target: str) -> torch.nn.Parameter: ...

    def to(self, device: torch.device) -> Any: ...


_Model = TypeVar("_Model", bound=Model)


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write `model` into the directory `path`, whole or not at all. Other files in the directory stay.

    A new directory appears when it is complete. In an existing one the files are replaced one after the other, weights
    first; they carry a copy of the settings, which `load` takes when the save was interrupted in between. Parameters
    that are one tensor under several names (a tied projection, a layer used twice) are written once and are one again
    when loaded.

    Raises:
        NotADirectoryError: `path` is a file.
        ValueError: `load` could not restore this model, because parameters have no values, do not fit its config, or
            overlap in memory; names them. Nothing is written then.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Andromeda.save: path must be a directory or not exist, got the file {path}")
    state, ties = _state_to_save(model)
    provider = _class_name(model.embedding_provider)
    if provider == _DEFAULT_PROVIDER and not is_plain_embedding(model.transformer.token_emb):
        provider = _class_name(model.transformer.token_emb)  # set afterwards: the default provider makes another
    dtype = _name(model.transformer.to_logits.weight.dtype)
    dtypes = {name: _name(tensor.dtype) for name, tensor in state.items() if tensor.is_floating_point()}
    settings = {
        "format": FORMAT,
        "save_id": uuid.uuid4().hex,  # settings and weights that belong together have the same one
        "arguments": dataclasses.asdict(model.config),
        "embedding_provider": provider,
        "dtype": dtype,
        "other_dtypes": {name: other for name, other in dtypes.items() if other != dtype},
        "ties": ties,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / "new"
        new.mkdir()
        metadata = {"format": "pt", "andromeda": json.dumps(settings), _SEAL: _NO_SEAL}
        save_file(state, new / WEIGHTS, metadata=metadata)
        _seal(new / WEIGHTS)
        settings["files"] = files.checksums(new, [WEIGHTS])
        (new / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        shutil.copymode(new / SETTINGS, new / WEIGHTS)  # safetensors writes a file that other users may not read
        files.flush_tree(new)
        if path.is_dir():
            os.replace(new / WEIGHTS, path / WEIGHTS)
            os.replace(new / SETTINGS, path / SETTINGS)
            files.flush(path)
        else:
            os.rename(new, path)
        files.flush(path.parent)


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def is_plain_embedding(module: torch.nn.Module) -> bool:
    """Whether the module is a `torch.nn.Embedding` or computes the same, also inside wrappers."""
    inside = [module]
    while inside:
        module = inside[0]
        inside = [child for name, child in module.named_children() if name in _WRAPPERS and name.startswith("_")]
    return type(module).forward is torch.nn.Embedding.forward


def _state_to_save(model: Model) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Parameters by name, each once; and the aliases: other name of a parameter -> its name in the first mapping."""
    own = model.state_dict()
    with torch.device("meta"):
        expected = type(model)(**dataclasses.asdict(model.config)).state_dict()
    if not is_plain_embedding(model.transformer.token_emb):  # it may have any parameters
        embedding = "transformer.token_emb."
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith(embedding)}
        expected |= {name: tensor for name, tensor in own.items() if name.startswith(embedding)}
    state, problems = rename(own, expected, "Andromeda.save")
    shapes, wanted = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (state, expected))
    problems += _differences(wanted, shapes)
    if problems:
        raise ValueError(
            "Andromeda.save: the model must have the parameters that load makes for its config; save its state_dict() "
            "instead\n" + "\n".join(problems)
        )
    abstract = [name for name, tensor in state.items() if tensor.is_meta]
    if abstract:
        raise ValueError(f"Andromeda.save: parameters must have values, got meta tensors: {', '.join(abstract)}")
    if sharded := [name for name, tensor in state.items() if hasattr(tensor, "device_mesh")]:
        raise ValueError(
            f"Andromeda.save: parameters must be whole, got parts of {', '.join(sharded[:3])} in each process; save "
            "the state_dict() by torch.distributed.checkpoint, or load the full one that its get_model_state_dict "
            "gives into a model in one process, and save that"
        )
    return apart(state, "Andromeda.save")


def apart(state: dict[str, torch.Tensor], owner: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors that share no memory, by name; and the aliases: other name of a tensor -> its name in the first mapping.

    Raises:
        ValueError: some tensors overlap; the message begins with `owner`.
    """
    firsts: dict[tuple[object, ...], str] = {}
    ties, kept, here = {}, {}, {}
    for name, tensor in state.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.numel() == 0:
            kept[name] = tensor  # sharded, or elsewhere
            continue
        place = tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride(), tensor.dtype
        if firsts.setdefault(place, name) != name:
            ties[name] = firsts[place]
        else:
            kept[name] = here[name] = tensor.detach()
    ends: dict[torch.device, tuple[int, str]] = {}  # where the tensors so far end, and the name of the last one
    for name, tensor in sorted(here.items(), key=lambda item: item[1].data_ptr()):
        begin, (end, other) = tensor.data_ptr(), ends.get(tensor.device, (0, ""))
        if begin < end:
            raise ValueError(
                f"{owner}: {other} and {name} must not overlap in memory, a part cannot be tied; make one of them a "
                "clone() or both the same tensor"
            )
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        ends[tensor.device] = begin + span * tensor.element_size(), name
    storages = collections.Counter(tensor.untyped_storage().data_ptr() for tensor in here.values())
    for name, tensor in here.items():
        shared = storages[tensor.untyped_storage().data_ptr()] > 1  # it is a piece of a buffer
        kept[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return kept, ties


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load(
    model_class: Callable[..., _Model],
    path: str | os.PathLike[str],
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | None = None,
    embedding_provider: EmbeddingProvider | None = None,
) -> _Model:
    """Load the model saved in the directory `path`. Memory for its parameters is allocated once.

    Args:
        model_class: `Andromeda`.
        device: device of the model; default the CPU.
        dtype: floating-point dtype of the parameters; default the one they were saved in.
        embedding_provider: required if the saved model did not have the default one.

    Raises:
        FileNotFoundError: the directory or a file is missing.
        ValueError: a file is damaged, has a newer format, or does not fit; names the file and every bad parameter.

    Warns:
        UserWarning: parameters are not finite; names them.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"Andromeda.load: path must be a directory made by save, found none at {path}")
    for name in (WEIGHTS, SETTINGS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"Andromeda.load: {path} must hold {WEIGHTS} and {SETTINGS}, {name} is missing")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"Andromeda.load: dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    found, metadata = read_header(path / WEIGHTS)
    settings = _read_settings(path / SETTINGS, (path / SETTINGS).read_bytes())
    settings = _verified(path, settings, metadata)
    arguments = settings["arguments"]
    odd = sorted(set(arguments) ^ {field.name for field in dataclasses.fields(ModelConfig)})
    if odd:
        raise ValueError(
            f"Andromeda.load: {path / SETTINGS} must hold the arguments of Andromeda, differs in {', '.join(odd)}"
        )
    ties = settings.get("ties") or {}
    if not isinstance(ties, dict) or not all(isinstance(name, str) for name in (*ties, *ties.values())):
        raise ValueError(f"Andromeda.load: the settings in {path / SETTINGS} are damaged: ties {ties!r}")
    shapes = {plain_name(name): shape for name, (shape, _) in found.items()}
    _check_sizes(path, arguments, shapes | dict.fromkeys(ties))
    if embedding_provider is not None:
        arguments = arguments | {"embedding_provider": _OnCpu(embedding_provider)}
    elif settings.get("embedding_provider", _DEFAULT_PROVIDER) != _DEFAULT_PROVIDER:
        raise ValueError(
            f"Andromeda.load: embedding_provider must be given, {path} was saved with one of the class "
            f"{settings['embedding_provider']}"
        )
    with torch.device("meta"):
        model = model_class(**arguments)
    if embedding_provider is not None:
        model.__dict__["embedding_provider"] = embedding_provider
    expected = model.state_dict()
    names = {name: plain_name(name, expected) for name in found}  # name in the file -> name in the model
    problems = _misfits(expected, {names[name]: entry for name, entry in found.items()}, ties, settings)
    if len(set(names.values())) < len(names):
        problems.append("    ambiguous: names that differ in those of wrappers alone")
    if problems:
        raise ValueError(f"Andromeda.load: {path / WEIGHTS} does not fit its settings\n" + "\n".join(problems))
    device = torch.device("cpu" if device is None else device)
    state: dict[str, torch.Tensor] = {}
    not_finite: dict[str, torch.Tensor] = {}
    for name, own_name in names.items():
        # Opened for each tensor: closing returns the mapped pages, which would otherwise count as a second copy.
        with safe_open(path / WEIGHTS, framework="pt") as file:
            tensor = file.get_tensor(name)
        if not is_finite(tensor):
            not_finite[own_name] = tensor
        target = dtype if tensor.is_floating_point() else None
        state[own_name] = tensor.to(device=device, dtype=target, copy=True)
    state |= {name: state[first] for name, first in ties.items()}
    model.load_state_dict(state, assign=True)
    for name, first in ties.items():
        module, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(module), parameter, model.get_parameter(first))
    warn_of_not_finite(f"Andromeda.load: {path}", not_finite)
    model.to(device)  # also moves tensors of a provider's module that are not in its state
    return model


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite, in one pass over memory that allocates nothing."""
    if tensor.numel() == 0 or not tensor.is_floating_point() or tensor.is_meta:
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor.detach()))


def warn_of_not_finite(owner: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Warn that these tensors are not finite. The warning begins with `owner`."""
    if not tensors:
        return
    shown = []
    for name, tensor in list(tensors.items())[:5]:
        shown.append(f"{name} ({(~tensor.detach().isfinite()).sum().item()} of {tensor.numel()})")
    if len(tensors) > len(shown):
        shown.append("...")
    warnings.warn(
        f"{owner} holds weights that are not finite, its results are NaN: {len(tensors)} parameters, "
        f"{', '.join(shown)}; take an earlier checkpoint",
        UserWarning,
        stacklevel=4,
    )


def _seal(file: Path) -> None:
    """Write the checksum of a file whose checksum is `_NO_SEAL` into its header."""
    with open(file, "r+b") as stream:
        length = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(0)
        place = stream.read(length).index(f'"{_SEAL}":"{_NO_SEAL}"'.encode()) + len(f'"{_SEAL}":"')
        stream.seek(place)
        stream.write(files.checksum(file).encode())


def _is_sealed(file: Path, seal: str) -> bool:
    """Whether `seal`, which the header holds, is the checksum of the rest."""
    state = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        length = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(0)
        state.update(stream.read(length).replace(f'"{_SEAL}":"{seal}"'.encode(), f'"{_SEAL}":"{_NO_SEAL}"'.encode(), 1))
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest() == seal


def _verified(path: Path, settings: dict[str, Any], metadata: dict[str, str]) -> dict[str, Any]:
    """The settings that belong to the weights, after a check of the checksums (older saves have none).

    Weights carry a copy of the settings and a checksum of themselves; the settings' file has a checksum of the
    weights' file.
    """
    weights, recorded = path / WEIGHTS, settings.pop("files", None)
    copied = _read_settings(weights, metadata["andromeda"]) if "andromeda" in metadata else None
    if copied is not None and copied.get("save_id") != settings.get("save_id"):
        # A save was interrupted after it had replaced the weights.
        if _SEAL in metadata and not _is_sealed(weights, metadata[_SEAL]):
            raise ValueError(f"Andromeda.load: {weights} is damaged, its checksum differs; restore it from a copy")
        return copied
    if recorded is None and _SEAL not in metadata:
        return settings
    try:
        faults = files.damages(path, {WEIGHTS: recorded[WEIGHTS]})
    except (TypeError, KeyError) as error:
        raise ValueError(f"Andromeda.load: the checksums in {path / SETTINGS} are damaged: {error!r}") from error
    if faults and _is_sealed(weights, metadata.get(_SEAL, "")):
        raise ValueError(f"Andromeda.load: {path / SETTINGS} is damaged, {WEIGHTS} is whole; restore it from a copy")
    if faults:
        raise ValueError(f"Andromeda.load: {weights} is damaged: {faults[0]}; restore it from a copy")
    if settings != copied:
        differing = []
        for ours, theirs in ((settings, copied or {}), (settings["arguments"], (copied or {}).get("arguments", {}))):
            differing += sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"Andromeda.load: {path / SETTINGS} must be as save wrote it, its copy in {WEIGHTS} differs in "
            f"{', '.join(differing)}; restore it, load the model and save it with other settings"
        )
    return settings


def _check_sizes(path: Path, arguments: dict[str, Any], shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Refuse settings that do not fit the weights before the model is built: building it could take forever."""
    try:
        config = ModelConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Andromeda.load: the settings in {path / SETTINGS} fit no model: {error}") from error
    check_layers(f"Andromeda.load: {path / WEIGHTS} does not fit its settings", config, shapes)


def check_layers(owner: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Compare depth and heads of a config with the names and shapes of saved parameters.

    Raises:
        ValueError: they differ; the message begins with `owner`.
    """
    layers = {found[1] for name in shapes if (found := re.match(r"transformer\.attn_layers\.layers\.(\d+)\.", name))}
    queries = shapes.get("transformer.attn_layers.layers.0.fn.to_q.weight")
    if 2 * config.depth > len(layers):  # fewer are named one by one
        raise ValueError(
            f"{owner}\n    missing: depth {config.depth} needs {2 * config.depth} sub-layers, found {len(layers)}"
        )
    if queries is not None and queries[:1] != (config.heads * config.dim_head,):
        raise ValueError(
            f"{owner}\n    misshapen: queries, {config.heads} heads of width {config.dim_head} have "
            f"{config.heads * config.dim_head} rows, found the shape {queries}"
        )


def _misfits(
    expected: dict[str, torch.Tensor],
    found: dict[str, tuple[tuple[int, ...], str]],
    ties: dict[str, str],
    settings: dict[str, Any],
) -> list[str]:
    """A line for each kind of difference between the model's tensors and (shape, dtype) by name."""
    if not set(ties) <= set(expected) or not set(ties.values()) <= set(found):
        return [f"    tied: {ties} must be names of parameters"]
    found = found | {name: found[first] for name, first in ties.items()}
    problems = _differences(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: shape for name, (shape, _) in found.items()},
    )
    others = settings.get("other_dtypes")  # absent from older saves
    for name, tensor in expected.items():
        if name in found and tensor.is_floating_point():
            _, dtype = found[name]
            wanted = None if others is None else others.get(ties.get(name, name), settings.get("dtype"))
            if dtype not in _DTYPES or (wanted is not None and _DTYPES[dtype] != wanted):
                wanted = wanted or "a floating-point dtype"
                problems.append(f"    dtype: {name} must be {wanted}, got {_DTYPES.get(dtype, dtype)}")
    return problems


class _OnCpu:
    """A provider whose module has values even while other modules are made on the meta device."""

    def __init__(self, provider: EmbeddingProvider):
        self.provider = provider
        if callable(getattr(provider, "get_embedding", None)):
            self.get_embedding = self._get_embedding

    def _get_embedding(self, num_tokens: int, dim: int) -> torch.nn.Module:
        with torch.device("cpu"):
            return self.provider.get_embedding(num_tokens, dim)


def read_header(
    file: Path, owner: str = "Andromeda.load"
) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """(shape, dtype) by name and the metadata of a safetensors file whose size is right."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > size - 8:
            raise ValueError(
                f"{owner}: {file} must be a whole safetensors file, got {size} bytes that end within its header"
            )
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{owner}: {file} must be a safetensors file, its header is damaged") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{owner}: {file} must hold {expected} bytes as its header says, found {size}")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in header if name != "__metadata__"}
            found = {name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()}
            return found, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{owner}: {file} must be a safetensors file: {error}") from error


def _read_settings(file: Path, text: str | bytes) -> dict[str, Any]:
    try:
        settings = json.loads(text)
        version, arguments = settings["format"], settings["arguments"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"Andromeda.load: the settings in {file} are damaged: {error!r}") from error
    if not isinstance(settings, dict) or not isinstance(version, int) or not isinstance(arguments, dict):
        raise ValueError(f"Andromeda.load: the settings in {file} are damaged: format {version!r}")
    if version > FORMAT:
        raise ValueError(f"Andromeda.load: {file} must have format {FORMAT} or older, got {version}; update andromeda")
    return settings


def _differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for each kind of difference between two maps from names to shapes."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} must have shape {expected[name]}, got {found[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    return [f"    {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]


def x_transformers_names(model: Model) -> dict[str, str]:
    """The parameters of `model` (docs/model.md#12): name in x-transformers' state dict -> name in ours."""
    config = model.config
    ours, theirs = "transformer.attn_layers", "attn_layers"
    names = {"to_logits.weight": "transformer.to_logits.weight"}
    if isinstance(model.transformer.token_emb, torch.nn.Embedding):
        names["token_emb.emb.weight"] = "transformer.token_emb.weight"
    else:
        own = model.transformer.token_emb.state_dict()
        names |= {f"token_emb.{name}": f"transformer.token_emb.{name}" for name in own}
    if config.use_abs_pos_emb:
        names["pos_emb.emb.weight"] = "transformer.pos_emb.weight"
    fn = "fn." if config.shift_tokens > 0 else ""
    attention = {f"to_{x}.weight": f"to_{x}.weight" for x in ("q", "k", "v", "out")}
    if config.learned_scales:
        attention |= {"qk_norm_q_scale": "q_scale", "qk_norm_k_scale": "k_scale"}
    feed_forward = {
        f"ff.{place}.{kind}": f"{name}.{kind}"
        for place, name in (("0.0", "proj_in"), ("2", "proj_out"))
        for kind in ("weight", "bias")
    }
    for i in range(2 * config.depth):
        theirs_i, ours_i = f"{theirs}.layers.{i}", f"{ours}.layers.{i}"
        names[f"{theirs_i}.0.{2 if config.deepnorm else 0}.gamma"] = f"{ours_i}.norm.gamma"
        for key, name in (feed_forward if i % 2 else attention).items():
            names[f"{theirs_i}.1.{fn}{key}"] = f"{ours_i}.fn.{name}"
        if config.deepnorm:
            names[f"{theirs_i}.2.residual_scale"] = f"{ours_i}.residual_scale"
    if not config.deepnorm:
        names[f"{theirs}.final_norm.gamma"] = f"{ours}.final_norm.gamma"
    return names


@torch.no_grad()
def load_x_transformers(model: Model, state_dict: Mapping[str, torch.Tensor], version: str = "2.31.10") -> None:
    """Copy a state dict of x-transformers into `model`, converting older versions (docs/model.md#12).

    Args:
        state_dict: that of a TransformerWrapper, or of an AutoregressiveWrapper around one. Parts of names that come
            from torch.compile, DDP, FSDP and other wrappers are removed.
        version: version of the library that wrote it; the state dict does not contain it.

    Raises:
        TypeError: a value is not a tensor.
        ValueError: the version is malformed, or the model cannot represent the checkpoint: names every missing,
            unexpected and misshapen key and every parameter that cannot be converted. The model is unchanged then.

    Warns:
        UserWarning: parameters are not finite; names them.
    """
    names = x_transformers_names(model)
    target = model.state_dict()
    tensors, problems = rename(state_dict, names, "load_x_transformers")
    problems += _convert(tensors, model.config, _parse_version(version))
    expected = {key: tuple(target[name].shape) for key, name in names.items()}
    problems += _differences(expected, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    if not problems:
        problems += _different_ties({key: target[name] for key, name in names.items()}, tensors)
    if problems:
        raise ValueError(f"load_x_transformers: state_dict does not fit (version {version})\n" + "\n".join(problems))
    for key, name in names.items():
        target[name].copy_(tensors[key])
    not_finite = {key: tensors[key] for key in names if not is_finite(tensors[key])}
    warn_of_not_finite("load_x_transformers: state_dict", not_finite)


def _different_ties(targets: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Lines for tied names, one parameter of the model, that have several values in the checkpoint."""
    firsts: dict[tuple[int, torch.Size], str] = {}
    problems = []
    for key, target in targets.items():
        first = firsts.setdefault((target.data_ptr(), target.shape), key)
        if not _same(tensors[first], tensors[key]):
            problems.append(f"    tied: {first} and {key} are one parameter of this model, and must have one value")
    return problems


def _parse_version(version: str) -> tuple[int, ...]:
    if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\d+){1,3}", version):
        raise ValueError(f"load_x_transformers: version must be like '2.31.10', got {version!r}")
    return tuple(int(part) for part in version.split("."))


def names_in_index(index: Path) -> Iterable[str]:
    """The names of the tensors in the index of a checkpoint that has several files."""
    return files.read_json(index, ("weight_map",))["weight_map"]


def plain_name(name: str, expected: Collection[str] = ()) -> str:
    """A name without the parts that wrappers insert; an expected name stays as it is."""
    parts = name.split(".")
    if name not in expected:
        parts = [part for part in parts if part not in _WRAPPERS]
    while parts[0] in _OWNERS and len(parts) > 1 and ".".join(parts) not in expected:
        del parts[0]
    return ".".join(parts)


WRAPPERS_PATTERN = rf"(^|\.)(?:(?:{'|'.join(sorted(_WRAPPERS))})\.)+"  # inserted by wrappers; group 1 stays


def rename(
    state_dict: Mapping[str, Any], expected: Collection[str], owner: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors by their expected names, without the parts that wrappers insert, and a line for each problem found.

    A model that holds both a network and its wrapper lists every tensor twice: equal tensors are taken once.

    Raises:
        TypeError: a value is not a tensor; the message begins with `owner`.
    """
    tensors: dict[str, torch.Tensor] = {}
    problems = []
    for full_name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{owner}: {full_name} must be a tensor, got {type(tensor).__name__}")
        name = plain_name(full_name, expected)
        if name in _COUNTERS and tensor.numel() == 1 and name not in expected:
            continue
        if name in tensors and not _same(tensors[name], tensor):
            problems.append(f"    ambiguous: {full_name} has another value under another prefix")
        tensors.setdefault(name, tensor)
    return tensors, problems


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def for_model(model: Model, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict under the names of `model`; wrappers may have changed the names in either of them.

    Raises:
        ValueError: one parameter has several values; names them.
    """
    own = model.state_dict()
    if all(name in own for name in state_dict):
        return state_dict
    names = {plain_name(name): name for name in own}
    tensors, problems = rename(state_dict, {**own, **names}, "Andromeda.load_state_dict")
    if problems:
        raise ValueError("Andromeda.load_state_dict: state_dict does not fit\n" + "\n".join(problems))
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _convert(tensors: dict[str, torch.Tensor], config: ModelConfig, version: tuple[int, ...]) -> list[str]:
    """Convert `tensors` to the current version in place; returns a line for each tensor that cannot be converted.

    Each step is a row of the table in docs/model.md#12.
    """
    problems: list[str] = []
    if config.rotary_xpos:  # constant tables that the model computes itself
        for table in ("inv_freq", "scale"):
            tensors.pop(f"attn_layers.rotary_pos_emb.{table}", None)
    if version >= (2, 25, 5):
        return problems
    if version < (1, 42, 18) and config.rotary_xpos and config.dim_head < 64:
        problems.append(
            f"    rotary: before 1.42.18 at least 32 channels were rotated, with dim_head={config.dim_head} this model "
            f"rotates {config.rotary_dim}"
        )
    if version < (1, 31, 3):
        problems += _convert_norms(tensors)
    if version < (1, 27, 0):
        problems += _drop_zero(tensors, "to_logits.bias")
    problems += _convert_key_scales(tensors, config)
    if version < (1, 30, 0) and config.rotary_xpos:
        for key in list(tensors):
            if re.search(r"\.(to_q\.weight|to_k\.weight|qk_norm_q_scale|qk_norm_k_scale)$", key):
                tensors[key] = _interleave_pairs(tensors[key], key, config)
    if config.norm_on:
        problems += _convert_score_scale(tensors, config, version)
    return problems


def _convert_norms(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Old versions stored the gain itself, as `weight` or `gamma`: gamma = gain - 1."""
    problems = []
    for key in list(tensors):
        found = re.fullmatch(r"(attn_layers\.(?:layers\.\d+\.0\.\d+|final_norm))\.(weight|gamma|bias|beta)", key)
        if found is None:
            continue
        if found[2] in ("bias", "beta"):
            problems += _drop_zero(tensors, key)
        else:
            tensors[f"{found[1]}.gamma"] = tensors.pop(key).double() - 1
    return problems


def _drop_zero(tensors: dict[str, torch.Tensor], key: str) -> list[str]:
    """Remove a bias that the model does not have, if it is zero."""
    bias = tensors.pop(key, None)
    if bias is not None and bias.any():
        return [f"    {key} must be zero, the model has no such bias, got values up to {bias.abs().max().item():.3g}"]
    return []


def _convert_key_scales(tensors: dict[str, torch.Tensor], config: ModelConfig) -> list[str]:
    """Some versions kept a key scale per query head although there is a single key head."""
    problems = []
    for key, scale in tensors.items():
        if not key.endswith("qk_norm_k_scale") or config.num_kv_heads != 1:
            continue
        if tuple(scale.shape) == (config.heads, 1, config.dim_head) and config.heads > 1:
            if torch.equal(scale, scale[:1].expand_as(scale)):
                tensors[key] = scale[:1]
            else:
                problems.append(f"    {key} must have equal rows, the model has one key head, got different ones")
                tensors[key] = scale[:1]  # so that its shape is not reported as well
    return problems


def _interleave_pairs(tensor: torch.Tensor, key: str, config: ModelConfig) -> torch.Tensor:
    """Rotary pairs were (t, t + r/2): new channel 2t is old channel t, new 2t + 1 is old t + r/2, in every head."""
    order = list(range(config.dim_head))
    half = config.rotary_dim // 2
    order[: config.rotary_dim] = [channel for t in range(half) for channel in (t, t + half)]
    axis = 0 if key.endswith(".weight") else -1
    if tensor.ndim == 0 or tensor.shape[axis] % config.dim_head != 0:
        return tensor  # its wrong shape will be reported
    heads = tensor.unflatten(axis, (-1, config.dim_head))  # the channels of a head are now axis 1 or -1
    return heads.index_select(1 if axis == 0 else -1, torch.tensor(order, device=tensor.device)).reshape(tensor.shape)


def _convert_score_scale(tensors: dict[str, torch.Tensor], config: ModelConfig, version: tuple[int, ...]) -> list[str]:
    """Convert scores tau * <a_q q, a_k k> with another tau to ours, d ** -0.5, by scaling both a_q and a_k."""
    root = math.sqrt(config.dim_head)
    inverted = version < (1, 22, 23) and config.attn_flash
    if not config.learned_scales:
        if inverted:
            return ["    qk_norm: before 1.22.23 attn_flash scaled scores by 1 / (10 * dim_head), here it is 10"]
        return []
    for key in list(tensors):
        if not key.endswith(("qk_norm_q_scale", "qk_norm_k_scale")):
            continue
        scale = tensors[key].double()
        if version > (2, 17, 0):  # the scales had no effect there: scores were 1000 * cosine
            tensors[key] = torch.full_like(scale, (1000 * root) ** 0.5)
        else:
            tensors[key] = scale * (10 * root) ** (-0.5 if inverted else 0.5)
    return []
