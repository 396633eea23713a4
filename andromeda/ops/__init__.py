"""The operations: one module each, which checks, allocates and differentiates, and the choice of a backend.

The functions are not handed on here: `andromeda.ops.attention` is the module of that name.
"""

from typing import Literal

# In order of preference. Which of them runs a call, and why not the others: `unsupported` of each operation.
Backend = Literal["cuda", "triton", "cpu", "reference"]
