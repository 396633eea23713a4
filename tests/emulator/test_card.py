"""The tests of test_cuda.py that do not use torch.cuda, on the emulator, which shows that these tests work."""

import pytest
import test_cuda
import torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("subject", test_cuda.SUBJECTS, ids=str)
def test_kernels_are_the_default(subject, emulated, monkeypatch):
    emulated.settings.check = False
    test_cuda.test_kernels_are_the_default(subject, CPU, monkeypatch)


@pytest.mark.parametrize("bounded", [False, True], ids=["online", "bounded"])
@pytest.mark.parametrize("case", test_cuda.SMALL, ids=str)
def test_small_calls_of_attention(case, bounded, emulated):
    test_cuda.test_small_calls_of_attention(case, bounded, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_small_calls_of_qk_norm_rotary(dtype, emulated):
    test_cuda.test_small_calls_of_qk_norm_rotary(dtype, CPU)


@pytest.mark.parametrize("dim", [64, 517, 1032, 8200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_small_calls_of_token_shift_norm(dtype, dim, emulated):
    test_cuda.test_small_calls_of_token_shift_norm(dtype, dim, CPU)
