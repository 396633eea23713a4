"""Numbers that must be finite: weights, losses and gradient norms."""

from collections.abc import Iterable

import torch


def nonfinite_parameters(model: torch.nn.Module) -> list[str]:
    """Names of the parameters of `model` that hold a NaN or an infinite number; waits once for the device."""
    values = {name: local(value.detach()) for name, value in model.named_parameters() if not value.is_meta}
    return [name for name, finite in zip(values, are_finite(values.values()), strict=True) if not finite]


def are_finite(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """Whether all numbers are finite, for each tensor; waits once for the device."""
    finite = [torch.isfinite(tensor).all() for tensor in tensors]
    return torch.stack([flag.to(finite[0].device) for flag in finite]).tolist() if finite else []


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that is in this process; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class StepRecord:
    """Losses and gradient norms of the steps, kept on the device, so that no step has to wait for it.

    Attributes:
        interval: float64 (3,), for the steps since the last figure: the sum of their losses, the number of steps that
            had a token to predict, and the number of all steps.
        bad: float64 (3,): the first step that was not finite, its loss and its gradient norm; zeros if there is none.
        norm: gradient norm of the current step.
    """

    # The loss scale of float16 begins at 2**16 and is halved each time a gradient overflows. After this many overflows
    # in a row, the gradients themselves are not finite.
    _OVERFLOWS = 24

    def __init__(self, device: torch.device | str, scaled: bool) -> None:
        """scaled: whether losses are scaled, as for float16, so that single gradients may overflow."""
        self.scaled = scaled
        self.interval = torch.zeros(3, dtype=torch.float64, device=device)
        self.bad = torch.zeros_like(self.interval)
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)
        self.norm: torch.Tensor | float | None = None
        self._begin()

    def _begin(self) -> None:
        self.loss = torch.zeros_like(self.bad[0])
        self.has_targets = torch.ones_like(self.loss)

    def add_part(self, loss: torch.Tensor, targets: torch.Tensor | int | None) -> None:
        """Add one forward pass of a step. targets: number of labels of the whole step, None if unknown."""
        self.loss += loss
        if targets is not None:
            self.has_targets = (torch.as_tensor(targets, device=self.loss.device).sum() != 0).to(self.loss.dtype)

    def end_step(self, step: int) -> None:
        """Add the loss and norm of the current step to `interval` and, if they are not finite, record them in `bad`."""
        norm = 0.0 if self.norm is None else self.norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm = torch.as_tensor(norm, device=self.loss.device).to(self.loss.dtype)
        good = torch.isfinite(norm)
        if self.scaled:
            self.overflows = torch.where(good, 0, self.overflows + 1)
            good = self.overflows < self._OVERFLOWS
        good = good & torch.isfinite(self.loss)
        found = torch.stack((torch.full_like(self.loss, step), self.loss, norm))
        self.bad = torch.where(good | (self.bad[0] > 0), self.bad, found)
        self.interval += torch.stack((self.loss, self.has_targets, torch.ones_like(self.loss)))
        self.norm = None
        self._begin()
