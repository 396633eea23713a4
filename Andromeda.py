"""`from Andromeda import Andromeda`: the public names of the package `andromeda`, with a capital letter.

This file is Andromeda.py and the package is the folder andromeda. So no two files share a name even where the file
system ignores case; there, Python also compares the case of the imported name (unless PYTHONCASEOK is set).
"""

import andromeda

__all__ = andromeda.__all__


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(andromeda, name)
