"""Each check accepts correct arguments; otherwise it names the argument, the axis and the value."""

import math
import re

import pytest
import torch

from andromeda.ops import _checks

AXES = ("batch", "seqlen", "width")


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def refuses(error, message):
    return pytest.raises(error, match=f"^op: {re.escape(message)}")


def test_tensor():
    _checks.check_tensor("op", "x", zeros(2, 3, 4), AXES)
    _checks.check_tensor("op", "x", zeros(2, 3, 8)[:, ::2, 1:5], AXES)
    _checks.check_tensor("op", "x", zeros(2, 3, 2)[..., ::2], AXES)  # one element is dense whatever its stride
    _checks.check_tensor("op", "x", zeros(0, 3, 4), AXES)
    with refuses(TypeError, "x must be a tensor, got list"):
        _checks.check_tensor("op", "x", [1.0], AXES)
    with refuses(ValueError, "x must have 3 dimensions (batch, seqlen, width), got shape (2, 3)"):
        _checks.check_tensor("op", "x", zeros(2, 3), AXES)
    with refuses(
        ValueError, "x must be dense in its last dimension (width), got strides (24, 8, 2); pass x.contiguous()"
    ):
        _checks.check_tensor("op", "x", zeros(2, 3, 8)[..., ::2], AXES)


def test_dtypes():
    for dtype in _checks.FLOAT_DTYPES:
        _checks.check_dtypes("op", x=zeros(1, dtype=dtype), y=zeros(2, dtype=dtype))
    with refuses(TypeError, "y.dtype must be one of float32, float16, bfloat16, float64, got int64"):
        _checks.check_dtypes("op", x=zeros(1), y=zeros(1, dtype=torch.int64))
    with refuses(TypeError, "x, y must have one dtype, got float32, float64; cast them or use torch.autocast"):
        _checks.check_dtypes("op", x=zeros(1), y=zeros(1, dtype=torch.float64))


def test_devices():
    _checks.check_devices("op", x=zeros(1), y=None, z=zeros(1))
    with refuses(ValueError, "x, z must be on one device, got cpu, meta"):
        _checks.check_devices("op", x=zeros(1), y=None, z=zeros(1).to("meta"))


def test_equal_axis():
    _checks.check_equal_axis("op", 1, "seqlen", x=zeros(2, 3), y=zeros(4, 3))
    with refuses(ValueError, "y.shape[0] (batch) must equal x.shape[0], got 4 and 2"):
        _checks.check_equal_axis("op", 0, "batch", x=zeros(2, 3), y=zeros(4, 3))


def test_heads():
    for num_heads, num_kv_heads in ((4, 4), (4, 2), (4, 1), (0, 2), (0, 0)):
        _checks.check_heads("op", zeros(1, 1, num_heads, 8), zeros(1, 1, num_kv_heads, 8))
    for num_heads, num_kv_heads in ((4, 3), (2, 4), (4, 0)):
        with refuses(ValueError, "q.shape[2] (num_heads) must be a multiple of k.shape[2] (num_kv_heads), got"):
            _checks.check_heads("op", zeros(1, 1, num_heads, 8), zeros(1, 1, num_kv_heads, 8))
    with refuses(ValueError, "k.shape[3] (head_dim) must equal q.shape[3], got 4 and 8"):
        _checks.check_heads("op", zeros(1, 1, 1, 8), zeros(1, 1, 1, 4))
    with refuses(ValueError, "q.shape[3] (head_dim) must be at least 1, got 0"):
        _checks.check_heads("op", zeros(1, 1, 1, 0), zeros(1, 1, 1, 0))


def test_exact():
    _checks.check_exact("op", "s", zeros(3), ("num_heads",), (3,), torch.float32)
    _checks.check_exact("op", "s", zeros(3, dtype=torch.float64), ("h",), (3,), torch.float32, torch.float64)
    with refuses(TypeError, "s must be a tensor, got float"):
        _checks.check_exact("op", "s", 1.0, ("num_heads",), (3,), torch.float32)
    with refuses(ValueError, "s must have shape (num_heads,) = (3,), got (3, 1)"):
        _checks.check_exact("op", "s", zeros(3, 1), ("num_heads",), (3,), torch.float32)
    with refuses(ValueError, "s must have shape (heads, width) = (3, 2), got (3,)"):
        _checks.check_exact("op", "s", zeros(3), ("heads", "width"), (3, 2), torch.float32)
    with refuses(TypeError, "s.dtype must be float32 or float64, got float16"):
        _checks.check_exact("op", "s", zeros(3, dtype=torch.float16), ("h",), (3,), torch.float32, torch.float64)


def test_finite_number():
    assert _checks.check_finite_number("op", "scale", 2) == 2.0
    assert isinstance(_checks.check_finite_number("op", "scale", 2), float)
    for value in (True, "1", None, torch.ones(())):
        with refuses(TypeError, f"scale must be a number, got {type(value).__name__}"):
            _checks.check_finite_number("op", "scale", value)
    for value in (math.nan, math.inf, -math.inf):
        with refuses(ValueError, f"scale must be finite, got {value}"):
            _checks.check_finite_number("op", "scale", value)
