"""Checkpoints: a directory of our own, and state dicts of every version of x-transformers (SPEC 12).

A saved model is a directory with `model.safetensors`, the parameters, and `andromeda.json`, the arguments of the
constructor. Nothing is unpickled.
"""

import dataclasses
import json
import math
import os
import re
import tempfile
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from andromeda import files
from andromeda.config import ModelConfig

WEIGHTS = "model.safetensors"
SETTINGS = "andromeda.json"
FORMAT = 1


def save(model, path) -> None:
    """Write `model` into the directory `path`, whole or not at all. Other files in the directory stay.

    A new directory appears when it is complete. In an existing one the files are replaced one after the other, weights
    first; they carry a copy of the settings, which `load` takes when the save was interrupted in between.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Andromeda.save: path must be a directory or not exist, got the file {path}")
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    abstract = [name for name, tensor in state.items() if tensor.is_meta]
    if abstract:
        raise ValueError(f"Andromeda.save: parameters must have values, got meta tensors: {', '.join(abstract)}")
    provider = type(model.embedding_provider)
    settings = {
        "format": FORMAT,
        "save_id": uuid.uuid4().hex,  # says which settings and weights belong together
        "arguments": dataclasses.asdict(model.config),
        "embedding_provider": f"{provider.__module__}.{provider.__qualname__}",
        "dtype": str(model.transformer.to_logits.weight.dtype).removeprefix("torch."),
    }
    text = json.dumps(settings, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / "new"
        new.mkdir()
        save_file(state, new / WEIGHTS, metadata={"format": "pt", "andromeda": text})
        (new / SETTINGS).write_text(text + "\n", encoding="utf-8")
        files.flush_tree(new)
        if path.is_dir():
            os.replace(new / WEIGHTS, path / WEIGHTS)
            os.replace(new / SETTINGS, path / SETTINGS)
            files.flush(path)
        else:
            os.rename(new, path)
        files.flush(path.parent)


def load(model_class, path, device=None, dtype=None, embedding_provider=None):
    """The model saved in the directory `path`. Memory for its parameters is taken once.

    Args:
        model_class: `Andromeda`.
        device: where to put it; default the CPU.
        dtype: floating-point dtype of the parameters; default the one they were saved in.
        embedding_provider: needed when the saved model had one of its own.

    Raises:
        FileNotFoundError: the directory or a file is missing.
        ValueError: a file is damaged, of a newer format, or does not fit; names the file and every parameter in doubt.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"Andromeda.load: path must be a directory made by save, found none at {path}")
    for name in (WEIGHTS, SETTINGS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"Andromeda.load: {path} must hold {WEIGHTS} and {SETTINGS}, {name} is missing")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"Andromeda.load: dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    shapes, metadata = _read_header(path / WEIGHTS)
    settings = _read_settings(path / SETTINGS, (path / SETTINGS).read_bytes())
    if "andromeda" in metadata:
        of_weights = _read_settings(path / WEIGHTS, metadata["andromeda"])
        if of_weights.get("save_id") != settings.get("save_id"):
            settings = of_weights  # a save was interrupted after it had replaced the weights
    arguments = settings["arguments"]
    odd = sorted(set(arguments) ^ {field.name for field in dataclasses.fields(ModelConfig)})
    if odd:
        raise ValueError(
            f"Andromeda.load: {path / SETTINGS} must hold the arguments of Andromeda, differs in {', '.join(odd)}"
        )
    default_provider = "andromeda.model.AndromedaEmbedding"
    if embedding_provider is not None:
        arguments = arguments | {"embedding_provider": _OnCpu(embedding_provider)}
    elif settings.get("embedding_provider", default_provider) != default_provider:
        raise ValueError(
            f"Andromeda.load: embedding_provider must be given, {path} was saved with one of the class "
            f"{settings['embedding_provider']}"
        )
    with torch.device("meta"):
        model = model_class(**arguments)
    if embedding_provider is not None:
        model.__dict__["embedding_provider"] = embedding_provider
    problems = _differences({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, shapes)
    if problems:
        raise ValueError(f"Andromeda.load: {path / WEIGHTS} does not fit its settings\n" + "\n".join(problems))
    device = torch.device("cpu" if device is None else device)
    state = {}
    for name in shapes:
        # Opened for each tensor: closing gives the mapped pages back, which would otherwise count as a second copy.
        with safe_open(path / WEIGHTS, framework="pt") as file:
            tensor = file.get_tensor(name)
        target = dtype if tensor.is_floating_point() else None
        state[name] = tensor.to(device=device, dtype=target, copy=True)
    model.load_state_dict(state, assign=True)
    return model.to(device)  # what a provider has beside its state


class _OnCpu:
    """A provider that makes its module with values, also where others are made on the meta device."""

    def __init__(self, provider):
        self.provider = provider
        if callable(getattr(provider, "get_embedding", None)):
            self.get_embedding = self._get_embedding

    def _get_embedding(self, num_tokens, dim):
        with torch.device("cpu"):
            return self.provider.get_embedding(num_tokens, dim)


def _read_header(file: Path):
    """Shapes by name and the metadata of a safetensors file whose size is right."""
    found = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > found - 8:
            raise ValueError(
                f"Andromeda.load: {file} must be a whole safetensors file, got {found} bytes that end within its header"
            )
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"Andromeda.load: {file} must be a safetensors file, its header is damaged") from error
    expected = 8 + length + max(ends, default=0)
    if found != expected:
        raise ValueError(f"Andromeda.load: {file} must hold {expected} bytes as its header says, found {found}")
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in header if name != "__metadata__"}
            return shapes, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"Andromeda.load: {file} must be a safetensors file: {error}") from error


def _read_settings(file: Path, text) -> dict:
    try:
        settings = json.loads(text)
        version, arguments = settings["format"], settings["arguments"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"Andromeda.load: the settings in {file} are damaged: {error!r}") from error
    if not isinstance(version, int) or not isinstance(arguments, dict):
        raise ValueError(f"Andromeda.load: the settings in {file} are damaged: format {version!r}")
    if version > FORMAT:
        raise ValueError(f"Andromeda.load: {file} must have format {FORMAT} or older, got {version}; update andromeda")
    return settings


def _differences(expected: dict, found: dict) -> list[str]:
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


def x_transformers_names(model) -> dict[str, str]:
    """The parameters of `model`: key in a state dict of x-transformers -> name in `model.state_dict()` (SPEC 12)."""
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
def load_x_transformers(model, state_dict, version="2.31.10") -> None:
    """Copy a state dict of x-transformers into `model`, converting what older versions meant otherwise (SPEC 12).

    Args:
        state_dict: of a TransformerWrapper, or of an AutoregressiveWrapper around one.
        version: of the library that wrote it. A state dict does not say.

    Raises:
        TypeError: a value is no tensor.
        ValueError: the version is no version; or the model cannot represent the checkpoint: names every missing,
            unexpected and misshapen key and whatever cannot be converted. The model is unchanged then.
    """
    names = x_transformers_names(model)
    target = model.state_dict()
    tensors, problems = _strip_prefixes(state_dict)
    problems += _convert(tensors, model.config, _parse_version(version))
    expected = {key: tuple(target[name].shape) for key, name in names.items()}
    problems += _differences(expected, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    if problems:
        raise ValueError(f"load_x_transformers: state_dict does not fit (version {version})\n" + "\n".join(problems))
    for key, name in names.items():
        target[name].copy_(tensors[key])


def _parse_version(version: str) -> tuple[int, ...]:
    if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\d+){1,3}", version):
        raise ValueError(f"load_x_transformers: version must be like '2.31.10', got {version!r}")
    return tuple(int(part) for part in version.split("."))


def _strip_prefixes(state_dict):
    """Tensors by key without the names of wrappers, and the problems found.

    A model that holds both the network and its wrapper lists everything twice: equal tensors are taken once.
    """
    tensors, problems = {}, []
    for full_key, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"load_x_transformers: {full_key} must be a tensor, got {type(tensor).__name__}")
        key = re.sub(r"^(module\.|decoder\.net\.|net\.|Andromeda\.)+", "", full_key)
        if key in tensors and not torch.equal(tensors[key], tensor):
            problems.append(f"    ambiguous: {full_key} has another value under another prefix")
        tensors[key] = tensor
    return tensors, problems


def _convert(tensors: dict, config: ModelConfig, version: tuple[int, ...]) -> list[str]:
    """Bring `tensors` to the meaning of the current version, in place; returns what cannot be represented.

    Each step is a row of the version table of SPEC 12, from the checkpoint's side: what it wrote, what we need.
    """
    problems = []
    if config.rotary_xpos:  # constant tables, which the model computes itself
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


def _convert_norms(tensors) -> list[str]:
    """The gain itself was stored, as `weight` or `gamma`: gamma = gain - 1."""
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


def _drop_zero(tensors, key) -> list[str]:
    """Remove a bias that the model does not have, which is possible when it is zero."""
    bias = tensors.pop(key, None)
    if bias is not None and bias.any():
        return [f"    {key} must be zero, the model has no such bias, got values up to {bias.abs().max().item():.3g}"]
    return []


def _convert_key_scales(tensors, config) -> list[str]:
    """Some versions kept a key scale per query head beside a single key head."""
    problems = []
    for key, scale in tensors.items():
        if not key.endswith("qk_norm_k_scale") or config.num_kv_heads != 1:
            continue
        if tuple(scale.shape) == (config.heads, 1, config.dim_head) and config.heads > 1:
            if torch.equal(scale, scale[:1].expand_as(scale)):
                tensors[key] = scale[:1]
            else:
                problems.append(f"    {key} must have equal rows, the model has one key head, got different ones")
                tensors[key] = scale[:1]  # named once, not also as misshapen
    return problems


def _interleave_pairs(tensor, key, config):
    """Rotary pairs were (t, t + r/2): new channel 2t is old channel t, new 2t + 1 is old t + r/2, in every head."""
    order = list(range(config.dim_head))
    half = config.rotary_dim // 2
    order[: config.rotary_dim] = [channel for t in range(half) for channel in (t, t + half)]
    axis = 0 if key.endswith(".weight") else -1
    if tensor.ndim == 0 or tensor.shape[axis] % config.dim_head != 0:
        return tensor  # misshapen, which is reported later
    heads = tensor.unflatten(axis, (-1, config.dim_head))  # the channels of a head are now axis 1 or -1
    return heads.index_select(1 if axis == 0 else -1, torch.tensor(order, device=tensor.device)).reshape(tensor.shape)


def _convert_score_scale(tensors, config, version) -> list[str]:
    """Bring scores tau * <a_q q, a_k k> of another tau to ours, d ** -0.5, by scaling both a_q and a_k."""
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
        if version > (2, 17, 0):  # without effect there: scores were 1000 * cosine
            tensors[key] = torch.full_like(scale, (1000 * root) ** 0.5)
        else:
            tensors[key] = scale * (10 * root) ** (-0.5 if inverted else 0.5)
    return []
