"""The record of losses and gradient norms."""

import math

import torch

from andromeda.training.finite import StepRecord


def test_float16_may_overflow_now_and_then():
    """Each overflow lowers the loss scale; only many in a row, or a loss that is not finite, end the run."""
    record = StepRecord("cpu", scaled=True)

    def step(number, loss, norm):
        record.add_part(torch.tensor(loss), None)
        record.norm = torch.tensor(norm)
        record.end_step(number)
        return record.bad[0].item()

    for number in range(1, 40):
        assert step(number, 2.0, math.inf if number % 20 else 1.0) == 0
    record.overflows.zero_()
    assert [step(number, 2.0, math.inf) for number in range(40, 65)] == [0] * 23 + [63, 63]
    record = StepRecord("cpu", scaled=True)
    assert step(1, 2.0, 1.0) == 0 and step(2, math.nan, 1.0) == 2 and step(3, math.inf, 1.0) == 2
