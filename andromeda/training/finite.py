"""Numbers that must be finite: weights, losses and gradient norms."""

import torch


def nonfinite_parameters(model: torch.nn.Module) -> list[str]:
    """Names of the parameters of `model` that hold a NaN or an infinite number; waits once for the device."""
    named = [(name, local(value.detach())) for name, value in model.named_parameters() if not value.is_meta]
    return [
        name for name, finite in zip((n for n, _ in named), are_finite(v for _, v in named), strict=True) if not finite
    ]


def are_finite(tensors: list[torch.Tensor]) -> list[bool]:
    finite = [torch.isfinite(tensor).all() for tensor in tensors]
    return torch.stack([flag.to(finite[0].device) for flag in finite]).tolist() if finite else []


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that is in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class StepRecord:
    """Losses and gradient norms, kept on the device: to note them, no step waits for it.

    Attributes:
        interval: float64 (3,): sum of the losses of the steps since the last figure, how many of them had a token to
            predict, and how many they were.
        bad: float64 (3,): the first step that was not finite, its loss and its gradient norm; zeros if there is none.
        norm: gradient norm of the step under way.
    """

    # The loss scale of float16 begins at 2**16 and is halved each time that a gradient overflows. When that has
    # happened so often in a row, the gradients themselves are not finite.
    _OVERFLOWS = 24

    def __init__(self, device, scaled: bool):
        self.scaled = scaled
        self.interval = torch.zeros(3, dtype=torch.float64, device=device)
        self.bad = torch.zeros_like(self.interval)
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)
        self.norm = None
        self._begin()

    def _begin(self):
        self.loss = torch.zeros_like(self.bad[0])
        self.has_targets = torch.ones_like(self.loss)

    def add_part(self, loss: torch.Tensor, targets):
        """One forward pass of a step. targets: number of labels of the whole step, None where it is not known."""
        self.loss += loss
        if targets is not None:
            self.has_targets = (torch.as_tensor(targets, device=self.loss.device).sum() != 0).to(self.loss.dtype)

    def end_step(self, step: int):
        norm = self.norm
        norm = 0.0 if norm is None else norm.full_tensor() if hasattr(norm, "full_tensor") else norm
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
