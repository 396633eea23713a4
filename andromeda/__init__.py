"""Andromeda: a decoder-only language model on hand-written CPU and CUDA kernels.

Importing this package loads torch and the compiled kernels. The tokenizer and the data sets need transformers or
datasets, and are loaded when they are first named.
"""

import importlib

from andromeda.model import Andromeda, AndromedaEmbedding, AutoregressiveWrapper, Decoder, TransformerWrapper
from andromeda.ops.attention import attention
from andromeda.ops.qk_norm_rotary import qk_norm_rotary

__version__ = "0.1.0"  # the one place: pyproject.toml and the build read it from here

__all__ = [
    "Andromeda",
    "AndromedaEmbedding",
    "AndromedaTokenizer",
    "AutoregressiveWrapper",
    "DatasetBuilder",
    "Decoder",
    "TransformerWrapper",
    "__version__",
    "attention",
    "qk_norm_rotary",
]

_MODULE_OF = {"AndromedaTokenizer": "andromeda.tokenizer", "DatasetBuilder": "andromeda.dataset"}


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
