"""Checks of a model and its tokenizer before training, for example that they can be saved and loaded again."""

import collections
import tempfile
from typing import TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from andromeda.data.tokenizer import AndromedaTokenizer
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.model import Andromeda

Model: TypeAlias = Andromeda | AndromedaForCausalLM
Tokenizer: TypeAlias = AndromedaTokenizer | PreTrainedTokenizerBase


def check_model(owner: str, model: object) -> None:
    """TypeError, in the name of `owner`, unless `model` is one of this package."""
    if not isinstance(model, Andromeda | AndromedaForCausalLM):
        raise TypeError(
            f"{owner}: model must be an Andromeda or AndromedaForCausalLM, not wrapped in something else, got a "
            f"{type(model).__name__}; trainer={{'torch_compile': True}} compiles it"
        )


def check_vocabulary(model: Model, tokenizer: Tokenizer | None) -> None:
    """ValueError if `tokenizer` has ids that `model` has no embedding for."""
    if tokenizer is None:
        return
    ids = len(hf_tokenizer(tokenizer))
    rows = model.config.vocab_size if isinstance(model, AndromedaForCausalLM) else model.config.num_tokens
    if ids > rows:
        raise ValueError(
            f"tokenizer: must have at most the {rows} ids of the model (num_tokens), got {ids}; "
            "build the model with a larger num_tokens or use the tokenizer it was trained with"
        )


def hf_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """The transformers tokenizer inside an `AndromedaTokenizer`, or the argument itself."""
    return tokenizer.tokenizer if isinstance(tokenizer, AndromedaTokenizer) else tokenizer


def check_saveable(model: AndromedaForCausalLM, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """ValueError if the model could not be saved after training, or could not be loaded again."""
    owner = "train: the model must be one that can be saved and loaded again"
    model.check_saveable(owner)
    if ties := shared_parameters(model):
        _check_ties(model, ties, owner)
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)


def shared_parameters(model: torch.nn.Module) -> list[list[str]]:
    """Groups of names for the same parameter."""
    groups = collections.defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _check_ties(model: AndromedaForCausalLM, ties: list[list[str]], owner: str) -> None:
    """Save and load a small model with the same ties: transformers decides by name which of them it can keep."""
    sizes = {"num_tokens": 8, "max_seq_len": 8, "dim": 16, "dim_head": 8}
    with torch.random.fork_rng(devices=[]):  # drawing its weights must not advance the random generator
        small = AndromedaForCausalLM.from_andromeda(Andromeda(**{**model.config.to_arguments(), **sizes}))
    for first, *others in ties:
        for name in others:
            holder, _, attribute = name.rpartition(".")
            setattr(small.get_submodule(holder), attribute, small.get_parameter(first))
    try:
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            AndromedaForCausalLM.from_pretrained(folder)
    except (RuntimeError, ValueError) as error:  # an OSError comes from the disk, not from the ties
        shared = "; ".join(" = ".join(names) for names in ties)
        raise ValueError(f"{owner}, got parameters that share one tensor ({shared}): {error}") from error
