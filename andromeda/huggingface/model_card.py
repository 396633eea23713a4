"""The model card, README.md in the folder of a saved model: what the model is, how it was trained, how to load it."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from andromeda import files

CARD = "README.md"
_FOLDER = "path/to/this/folder"
_KINDS = {  # the automatic class that loads a model, and the hub's name of its task
    "AndromedaForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "AndromedaForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "AndromedaForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
}
_MARK = re.compile(r"\n<!-- written by andromeda-kernels, ([0-9a-f]{32}) -->\n\Z")


def model_card(
    model: PreTrainedModel,
    *,
    name: str | None = None,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, float] | None = None,
    evaluated_on: str = "held-out text",
    tags: Iterable[str] = (),
) -> ModelCard:
    """A card that describes `model`, with the metadata that the hub reads.

    Args:
        model: a model of this package.
        name: of its repository on the hub ("owner/name"), or a title. Default: "Andromeda".
        training: figures of the run, such as {"steps": 2000, "tokens": 8_192_000, "tokenizer": "byte-level BPE"}.
        evaluation: figures such as {"loss": 2.1, "bits_per_byte": 1.1, "tokens": 4000}; the metadata, too, has those
            that are no counts.
        evaluated_on: the name of the data of `evaluation`.
        tags: further tags for the hub.
    """
    automatic, task = _KINDS.get(type(model).__name__, ("AutoModel", "feature-extraction"))
    title = name or "Andromeda"
    results = [
        EvalResult(
            task_type=task,
            dataset_type="text",
            dataset_name=evaluated_on,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in (evaluation or {}).items()
        if isinstance(value, float)  # whole numbers are counts
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["andromeda", "andromeda-kernels", "custom_code"],
        model_name=title.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    sections = [f"# {title.rpartition('/')[2]}", _what(model), _table("Sizes", _sizes(model))]
    sections += [_table("Training", training)] if training else []
    sections += [_table(f"Evaluation on {evaluated_on}", evaluation)] if evaluation else []
    sections += [_loading(type(model).__name__, automatic, name if name and "/" in name else _FOLDER)]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    add_tags(card, tags)
    return card


def add_tags(card: ModelCard, tags: Iterable[str]) -> None:
    """Add the tags that a card does not have."""
    known = list(card.data.get("tags") or ())
    if new := [tag for tag in tags if tag not in known]:
        card.data["tags"] = known + new


def write_model_card(folder: str | os.PathLike[str], card: ModelCard) -> bool:
    """Write a card as README.md into a folder, unless somebody has written or changed the one that is there.

    Returns:
        Whether it was written.

    Raises:
        OSError: it could not be written; names the cause and a remedy.
    """
    path = Path(folder, CARD)
    if is_foreign_card(path):
        return False
    text = str(card)
    files.write_text(path, f"{text}\n<!-- written by andromeda-kernels, {_checksum(text)} -->\n")
    return True


def is_foreign_card(path: Path) -> bool:
    """Whether there is a card that `write_model_card` did not write, or that was changed since."""
    if not path.exists():
        return False
    text = path.read_bytes().decode("utf-8", "replace")
    mark = _MARK.search(text)
    return mark is None or _checksum(text[: mark.start()]) != mark[1]


def _checksum(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _what(model: PreTrainedModel) -> str:
    return (
        f"`{type(model).__name__}`, a decoder-only transformer with {_parameters(model):,} parameters. Its classes and "
        "kernels are in the Python package [andromeda-kernels](https://github.com/andromeda-kernels/andromeda)."
    )


def _parameters(model: PreTrainedModel) -> int:
    """Their number in a model of this config: those of a quantised or sharded one have other sizes."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in type(model)(model.config).parameters())


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    positions = {
        "ALiBi": config.alibi_pos_bias,
        "rotary xPos": config.rotary_xpos,
        "absolute table": config.use_abs_pos_emb,
    }
    return {
        "parameters": _parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "width": config.hidden_size,
        "blocks": config.num_hidden_layers,
        "query heads": config.num_attention_heads,
        "key heads": config.num_key_value_heads,
        "width of a head": config.head_dim,
        "vocabulary": config.vocab_size,
        "window of generation": config.max_position_embeddings,
        "positions": ", ".join(name for name, present in positions.items() if present) or "none",
    }


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", r"\|")


def _loading(name: str, automatic: str, place: str) -> str:
    commands = []
    if automatic == "AutoModelForCausalLM":
        local = place if place == _FOLDER else "model"
        commands = [f"andromeda generate {local} --prompt 'Once upon' --tokens 100", f"andromeda serve {local}"]
        if place != _FOLDER:
            commands.insert(0, f"hf download {place} --local-dir {local}")
    return _LOADING.format(name=name, automatic=automatic, place=place) + (
        _COMMANDS.format(commands="\n".join(commands)) if commands else ""
    )


_LOADING = """\
## How to load it

First `pip install andromeda-kernels`. With the package imported:

```python
from andromeda.huggingface import {name}

model = {name}.from_pretrained("{place}")
```

In a program that does not know the package, by the automatic classes of transformers:

```python
from transformers import {automatic}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}", trust_remote_code=True)
model = {automatic}.from_pretrained("{place}", trust_remote_code=True)
```"""
_COMMANDS = """

On the command line; `serve` answers the clients of OpenAI's interface:

```bash
{commands}
```"""
