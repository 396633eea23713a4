"""The architectures that the Triton kernels know, and the names of others."""

import types

import pytest
import torch
from emulator import DEVICES

from andromeda.triton_kernels import launch


@pytest.mark.parametrize(
    "target, name",
    [
        (("cuda", 80), "sm_80"),
        (("cuda", 86), "sm_86"),
        (("cuda", 87), "sm_80"),
        (("cuda", 89), "sm_86"),
        (("cuda", 90), "sm_90"),
        (("cuda", 100), "sm_100"),
        (("cuda", 103), "sm_100"),
        (("cuda", 120), "sm_120"),
        (("cuda", 121), "sm_120"),
        (("hip", "gfx90a"), "gfx942"),
        (("hip", "gfx942:sramecc+:xnack-"), "gfx942"),
        (("hip", "gfx950"), "gfx942"),
        (("cuda", 75), None),
        (("cuda", 88), None),
        (("cuda", 110), None),
        (("hip", "gfx1100"), None),
        (("hip", "gfx908"), None),
    ],
)
def test_architecture_of(target, name):
    assert launch.architecture_of(*target) == name
    assert name is None or (name in launch.SHARED_MEMORY and name in launch.OLDEST_TRITON)


@pytest.mark.parametrize(
    "hip, properties, name, words",
    [
        (None, {"major": 8, "minor": 9}, "sm_86", "compute capability 8.9"),
        (None, {"major": 7, "minor": 5}, None, "compute capability 7.5"),
        ("6.4", {"gcnArchName": "gfx942:sramecc+", "major": 9, "minor": 4}, "gfx942", "gfx942"),
        ("6.4", {"gcnArchName": "gfx1100", "major": 11, "minor": 0}, None, "gfx1100"),
    ],
)
def test_a_gpu_is_asked_once(monkeypatch, hip, properties, name, words):
    asked = []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: asked.append(device) or types.SimpleNamespace(**properties)
    )
    launch._architecture_of_gpu.cache_clear()
    try:
        for device in ("cuda:0", "cuda:0", "cuda"):
            assert launch.architecture(torch.device(device)) == name
        assert asked == [torch.device("cuda", 0), 1]
        assert launch.describe(torch.device("cuda", 0)) == words
    finally:
        launch._architecture_of_gpu.cache_clear()


def test_the_emulated_gpu_counts_for_tensors_of_the_cpu(emulated_triton):
    cpu = torch.device("cpu")
    names = {"A100": "sm_80", "RTX 3090": "sm_86", "L4": "sm_86", "H200": "sm_90"}
    for device, name in names.items():
        emulated_triton.settings.device = device
        assert launch.architecture(cpu) == name
        assert launch.SHARED_MEMORY[name] == 1024 * DEVICES[device].shared_per_block
        assert launch.multiprocessors(cpu) == DEVICES[device].multiprocessors
        assert launch.warp_size(cpu) == 32


def test_multiprocessors_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    counts = {0: 132, 1: 108}
    properties = lambda index: types.SimpleNamespace(multi_processor_count=counts[index])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    launch._multiprocessors_of_gpu.cache_clear()
    try:
        found = [launch.multiprocessors(), *(launch.multiprocessors(torch.device(f"cuda:{i}")) for i in (0, 1))]
        assert found == [108, 132, 108]
    finally:
        launch._multiprocessors_of_gpu.cache_clear()
