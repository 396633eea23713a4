"""The check of results before anything is timed, and reports about contenders that fail."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import cases

OURS = "andromeda"  # the name of this library in rows and notes; names of its variants begin with it
TRITON = f"{OURS}, triton"  # its Triton kernels; rows without this mark are of the compiled kernels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference between two ways to compute an output of attention, whose magnitude is about 1.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class Judge:
    """Compares an output with plain torch at some rows, and everywhere with the first output that agreed there."""

    def __init__(self, inputs: cases.AttentionInputs) -> None:
        self.rows, self.exact = inputs.exact_rows()
        self.agreement = AGREEMENT[inputs.case.dtype]
        self.first: tuple[str, torch.Tensor] | None = None

    def objection(self, name: str, out: torch.Tensor) -> str | None:
        difference = (out[:, self.rows].float() - self.exact).abs().max().item()
        if not difference <= self.agreement:
            return f"differs by {difference:.2g} from plain torch"
        if self.first is None:
            self.first = name, out
        difference = (out.float() - self.first[1].float()).abs().max().item()
        return None if difference <= self.agreement else f"differs by {difference:.2g} from {self.first[0]}"


def describe(error: Exception, warned: list[str]) -> str:
    """One line: the first line of the error, and the warnings before it without positions in torch's sources."""
    lines = [text.strip().partition("\n")[0].partition(" (Triggered internally")[0] for text in (str(error), *warned)]
    return f"{type(error).__name__}: {'; '.join(dict.fromkeys(filter(None, lines))) or 'no message'}"


def absence(name: str, what: str, error: Exception, warned: list[str]) -> str:
    """A note about a row that is missing because its function raised `error`.

    Only the note about a Triton row whose backend refuses the call does not begin with this library's name: whether
    Triton is installed is a fact about the machine. Its last line gives the reasons.
    """
    if name.startswith(TRITON) and isinstance(error, NotImplementedError):
        return f"No row `{name}` for {what}: {str(error).strip().splitlines()[-1].strip()}"
    return f"{name} did not run {what}: {describe(error, warned)}"


def is_spoilt(device: str) -> bool:
    """Whether an earlier error prevents this process from using the GPU."""
    if device == "cpu":
        return False
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        return True
    return False


def exit_if_missing(notes: list[str]) -> None:
    """End with an error if a note is about this library: other packages may fail or differ, its own kernels must not.

    Call it after everything is written.
    """
    if missing := [note for note in notes if note.startswith(OURS)]:
        sys.exit("\n".join(missing))
