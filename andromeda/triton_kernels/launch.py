"""What all launches share: the architecture of a device, by which tiles are chosen, and options of the compiler."""

import functools

import torch

# Products and sums are fused into one rounding: the error bounds count on it, and Triton 3.10 does not by default.
OPTIONS = {"enable_fp_fusion": True}

# The architectures that have tiles of their own, and what a block may use of shared memory there, in bytes.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,  # 8.0 and 8.7
    "sm_86": 99 * 1024,  # 8.6 and 8.9
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,  # 10.x
    "sm_120": 99 * 1024,  # 12.x
    "gfx942": 64 * 1024,  # CDNA: MI200 and later
}
# The oldest Triton for each architecture. In 3.4 a compiler pass for sm_100 (TritonGPUHoistTMEMAlloc) fails on the
# backward pass of attention.
OLDEST_TRITON = {**dict.fromkeys(SHARED_MEMORY, (3, 4)), "sm_100": (3, 5)}
_SM = {(8, 0): "sm_80", (8, 7): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90"}
_SM_OF_MAJOR = {10: "sm_100", 12: "sm_120"}
_CDNA = ("gfx90a", "gfx940", "gfx941", "gfx942", "gfx950")


def architecture(device: torch.device) -> str | None:
    """The name in `SHARED_MEMORY` of the architecture of a GPU; None if the kernels have no tiles for it."""
    if device.type == "cuda":
        return _architecture_of_gpu(device if device.index is not None else torch.cuda.current_device())
    # Tests run the kernels without a GPU, on tensors of the CPU: then Triton's driver knows what it pretends to be.
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return architecture_of(target.backend, target.arch)


@functools.cache
def _architecture_of_gpu(device: torch.device | int) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return architecture_of("hip", properties.gcnArchName)
    return architecture_of("cuda", 10 * properties.major + properties.minor)


def architecture_of(backend: str, arch: int | str) -> str | None:
    """The same for the names that Triton uses: ("cuda", 89) or ("hip", "gfx942")."""
    if backend == "cuda":
        major, minor = divmod(int(arch), 10)
        return _SM.get((major, minor)) or _SM_OF_MAJOR.get(major)
    return "gfx942" if str(arch).partition(":")[0] in _CDNA else None


def multiprocessors(device: torch.device | None = None) -> int:
    """The number of multiprocessors of a GPU, by default the current one."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        index = torch.cuda.current_device() if device is None or device.index is None else device.index
        return _multiprocessors_of_gpu(index)
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(driver.active.get_current_device())["multiprocessor_count"])


@functools.cache
def _multiprocessors_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def warp_size(device: torch.device) -> int:
    """The number of lanes of a warp."""
    return 64 if architecture(device) == "gfx942" else 32


def describe(device: torch.device) -> str:
    """A GPU in the words of its vendor: "compute capability 7.5" or "gfx1030"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"compute capability {properties.major}.{properties.minor}"
