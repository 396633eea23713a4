"""The operations: one module each, which checks, allocates and differentiates; and the choice of a backend.

This package does not re-export the functions: `andromeda.ops.attention` is the module of that name.
"""

from typing import Literal

# In order of preference. `unsupported` of each operation decides which of them can run a call, and why others cannot.
Backend = Literal["cuda", "triton", "cpu", "reference"]
