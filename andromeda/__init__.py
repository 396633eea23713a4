"""Andromeda: a decoder-only language model on hand-written CPU and CUDA kernels.

Importing this package loads torch and the compiled kernels. The tokenizer and the data sets need transformers or
datasets, and are loaded at their first use.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from andromeda.data.builder import DatasetBuilder
    from andromeda.data.tokenizer import AndromedaTokenizer

    use_available_processors: Callable[[], int]  # of andromeda.cli, which imports this module

__version__ = "0.2.0"  # pyproject.toml and the build read it from here

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
    "linear_cross_entropy",
    "qk_norm_rotary",
    "use_available_processors",
]

# The module of each public name, for the names that are loaded at their first use.
_MODULE_OF = {
    "AndromedaTokenizer": "andromeda.data.tokenizer",
    "DatasetBuilder": "andromeda.data.builder",
    "use_available_processors": "andromeda.cli.threads",
    "attention": "andromeda.ops.attention",
    "linear_cross_entropy": "andromeda.ops.linear_cross_entropy",
    "qk_norm_rotary": "andromeda.ops.qk_norm_rotary",
}
_MODULE_OF |= dict.fromkeys(set(__all__) - {*_MODULE_OF, "__version__"}, "andromeda.model")

if not TYPE_CHECKING:  # otherwise a type checker would accept any name as one of the package

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_the_command() -> bool:
    """Whether Python is about to run `andromeda.__main__`: by `python -m andromeda`, or by the script of that name."""
    if sys.argv[:1] == ["-m"]:  # the value of argv while Python looks for the module
        return __name__ in sys.orig_argv
    return bool(sys.argv) and os.path.basename(sys.argv[0]) == __name__


# The command sets the handling of signals and the number of threads before torch is loaded.
if not TYPE_CHECKING and _is_the_command():
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `__main__` is loaded, Ctrl-C ends it without a traceback
else:
    from andromeda.model import Andromeda, AndromedaEmbedding, AutoregressiveWrapper, Decoder, TransformerWrapper
    from andromeda.ops.attention import attention
    from andromeda.ops.linear_cross_entropy import linear_cross_entropy
    from andromeda.ops.qk_norm_rotary import qk_norm_rotary
