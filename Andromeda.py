"""`from Andromeda import Andromeda`: the names of the package `andromeda`, under the spelling of the API document.

This file is Andromeda.py and the package is the folder andromeda: no two files share a name even where the file system
ignores case, and Python compares the case of what it imports there too (unless PYTHONCASEOK is set).
"""

from andromeda import (
    Andromeda,
    AndromedaEmbedding,
    AndromedaTokenizer,
    AutoregressiveWrapper,
    DatasetBuilder,
    Decoder,
    TransformerWrapper,
    __version__,
    attention,
    qk_norm_rotary,
)

__all__ = ["Andromeda"]
