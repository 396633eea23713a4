"""The output of a training step: its logits are computed if somebody reads them.

The logits are the largest tensor of a training step, and the loss does not need them. Trainers that show an entropy or
an accuracy read them; then they are there.
"""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast


class UnreadLogits:
    """`head(features)`, computed at the first call under the autocast of the forward pass.

    Where gradients are recorded and the stored result has none, it is computed again.
    """

    def __init__(self, head: nn.Module, features: torch.Tensor):
        self.head, self.features = head, features
        device = features.device.type
        self._autocast: dict[str, Any] | None = None
        if torch.amp.is_autocast_available(device):  # not on the device meta
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            self._autocast = {"device_type": device, "enabled": enabled, "dtype": dtype}
        self._logits: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        """(batch, n, vocab_size)."""
        logits = self._logits
        if logits is None or (torch.is_grad_enabled() and not logits.requires_grad and self.features.requires_grad):
            with contextlib.nullcontext() if self._autocast is None else torch.autocast(**self._autocast):
                logits = self._logits = self.head(self.features)
        return logits


@dataclasses.dataclass
class TrainingOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` whose entry "logits" may be `UnreadLogits`.

    Reading `output.logits`, `output["logits"]` or its number computes them; `to_tuple` leaves them out.
    """

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value() if name == "logits" and isinstance(value, UnreadLogits) else value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return tuple(self[name] for name in list(self.keys())[key])
        value = dict.__getitem__(self, key if isinstance(key, str) else list(self.keys())[key])
        return value() if isinstance(value, UnreadLogits) else value

    def to_tuple(self) -> tuple[Any, ...]:
        """The entries, without logits that nobody has read."""
        return tuple(value for value in self.values() if not isinstance(value, UnreadLogits))
