"""CUDA kernels without a GPU: an interpreter runs their PTX on the CPU and checks every rule of the machine.

    emu = Emulator(device="A100", schedule="random", seed=7)
    q, out = emu.tensor(q_cpu, name="q"), emu.empty(q_cpu.shape, q_cpu.dtype, name="out")
    with emu:
        emu.extension.qk_norm_rotary_forward(q=q, ..., q_out=out, stream=0)  # the real binding and launcher
    emu.assert_clean(); emu.launches[-1].grid; out.cpu()

Whole operations run with the fixture `emulated` of conftest.py: `attention(q, k, v, backend="cuda")` on CPU tensors.
PTX of any origin: `emu.run_ptx(text, "kernel", grid, block, (q, out, 17, 0.5))`. The first use builds the emulator
(build.py); without nvcc an `Emulator` skips the test, or fails it if CI=true.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import re
import struct
import threading
import weakref

import pytest
import torch

from emulator import build
from emulator.build import unavailable

__all__ = ["DEVICES", "Device", "DeviceTensor", "EmulatedExtension", "Emulator", "unavailable"]


@dataclasses.dataclass(frozen=True)
class Device:
    """The properties of the simulated GPU; shared memory in KiB."""

    major: int
    minor: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int


DEVICES = {
    "A100": Device(8, 0, 108, 163, 164, 2048, 32),
    "RTX 3090": Device(8, 6, 82, 99, 100, 1536, 16),
    "L4": Device(8, 9, 58, 99, 100, 1536, 24),
    "H200": Device(9, 0, 132, 227, 228, 2048, 32),
}


@dataclasses.dataclass
class Settings:
    """Settings for launches; may be changed between calls.

    device: a name of `DEVICES`, or a `Device`.
    schedule: order of blocks and warps: "fifo", "reverse" or "random" (with `seed`).
    check: look for races, accesses outside buffers and so on; False: only results, faster.
    execute: False: a launch returns at once, to time the work of the host before it.
    blocks: linear indices of the blocks to run; None runs all.
    capture: the number of the graph capture that includes every stream; 0: none.
    current_device: the CUDA device at the call, 0 or 1.
    driver_version: the newest CUDA that the driver supports, 13000 for 13.0; 0: no driver; None: that of the build.
    failures: runtime calls that fail, with their errors: {"cudaSetDevice": "cudaErrorNoDevice"}.
    """

    device: str | Device = "A100"
    schedule: str = "fifo"
    seed: int = 1
    check: bool = True
    execute: bool = True
    blocks: tuple[int, ...] | None = None
    capture: int = 0
    current_device: int = 0
    driver_version: int | None = None
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


class DeviceTensor:
    """A tensor in guarded memory that the bindings take for a tensor on a GPU."""

    is_cpu, is_cuda = False, True

    def __init__(self, address, shape, strides, dtype, device_index=0):
        self.shape, self.dtype = torch.Size(shape), dtype
        self._address, self._strides, self._device_index = address, tuple(strides), device_index

    def data_ptr(self):
        return self._address

    def stride(self):
        return self._strides

    def get_device(self):
        return self._device_index

    @property
    def device(self):
        return torch.device("cuda", self._device_index)

    @property
    def memory(self):
        """The tensor itself for the host, without a copy, to read or write single elements of a huge tensor."""
        return self._span().as_strided(self.shape, self._strides)

    def cpu(self):
        """A copy with the same strides."""
        return self._span().clone().as_strided(self.shape, self._strides)

    def _span(self):
        """All memory from the first to the last element, gaps included."""
        elements = _span_of(self.shape, self._strides)
        if elements == 0:
            return torch.empty(0, dtype=self.dtype)
        buffer = (ctypes.c_char * (elements * self.dtype.itemsize)).from_address(self._address)
        buffer.owner = self  # the memory is released with its last tensor
        return torch.frombuffer(buffer, dtype=self.dtype)


def _span_of(shape, strides):
    """The number of elements from the first to the last of a view, both included."""
    if 0 in shape:
        return 0
    if min(strides, default=0) < 0:
        raise ValueError(f"emulator: strides must not be negative, got {strides}")
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _contiguous_strides(shape):
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))[-len(shape) :] if shape else ()


class Emulator:
    """A simulated GPU with its own memory. Keyword arguments are those of `Settings`.

    extension: the bindings of `andromeda._C`, compiled from the same objects, on the simulated CUDA runtime. Call it
        inside `with emu:`.
    launches: each launch with its kernel, grid, block, cluster, programmatic, shared_bytes, stream, error and counters.
    reports: the errors found: kind, text and line of the kernel's source.
    calls: allocations and synchronisations by the launchers, by name.
    """

    _lock = threading.RLock()  # a process has a single simulated driver

    def __init__(self, **settings):
        self.settings = Settings(**settings)
        if reason := unavailable():
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
        self.extension, self._host = build.load()
        self.launches, self.reports, self.calls = [], [], []
        self._depth = 0

    def __enter__(self):
        self._lock.acquire()
        try:
            if self._depth == 0:
                self._set_up()
        except BaseException:
            self._lock.release()
            raise
        self._depth += 1
        return self

    def __exit__(self, *_):
        self._depth -= 1
        if self._depth == 0:
            self._host.check_no_error_left()
            self.launches += self._host.take_launches()
            self.reports += self._host.take_reports()
            self.calls += self._host.take_calls()
        self._lock.release()

    def _set_up(self):
        given = self.settings
        pretended = DEVICES[given.device] if isinstance(given.device, str) else given.device
        device, settings = self._host.Device(), self._host.Settings()
        for field in dataclasses.fields(pretended):
            kibibytes = field.name.startswith("shared")
            setattr(device, field.name, getattr(pretended, field.name) * (1024 if kibibytes else 1))
        settings.schedule = getattr(self._host.Schedule, given.schedule)
        settings.seed, settings.check, settings.blocks = given.seed, given.check, list(given.blocks or ())
        settings.execute = given.execute
        version = self._host.runtime_version if given.driver_version is None else given.driver_version
        self._host.set_up(device, settings, given.capture, given.current_device, version, given.failures)

    def tensor(self, source, *, name, writable=False, device_index=0):
        """A copy of a CPU tensor with its strides and alignment. The buffer includes the gaps between its rows."""
        source = source.detach()
        result = self._place(
            source.shape,
            source.stride(),
            source.dtype,
            device_index,
            lambda size: self._host.allocate(
                size, name, writable, source.storage_offset() * source.dtype.itemsize % 256
            ),
        )
        result._span().copy_(source.as_strided((_span_of(source.shape, source.stride()),), (1,)))
        return result

    def empty(self, shape, dtype, *, name, strides=None, device_index=0):
        """A tensor for results, filled with NaN (integers: with -1)."""
        strides = _contiguous_strides(shape) if strides is None else strides
        return self._place(shape, strides, dtype, device_index, lambda size: self._host.allocate(size, name, True, 0))

    def sparse(self, shape, dtype, *, name, strides=None, writable=True):
        """A tensor of zeros that takes memory only where it is accessed, for shapes larger than memory."""
        strides = _contiguous_strides(shape) if strides is None else strides
        return self._place(shape, strides, dtype, 0, lambda size: self._host.reserve(size, name, writable))

    def _place(self, shape, strides, dtype, device_index, allocate):
        size = _span_of(shape, strides) * dtype.itemsize
        if size == 0:
            return DeviceTensor(0, shape, strides, dtype, device_index)
        with self._lock:
            address = allocate(size)
            if device_index != 0:
                self._host.set_device_of(address, device_index)
        result = DeviceTensor(address, shape, strides, dtype, device_index)
        weakref.finalize(result, self._release, address).atexit = False
        return result

    def _release(self, address):
        with self._lock:
            self._host.release(address)

    def run_ptx(self, text, kernel, grid, block, arguments, shared=0, cluster=None, programmatic=False):
        """Run one kernel of a PTX text.

        arguments: one per parameter: a `DeviceTensor`, an int, a float, or bytes (also a ctypes value) of its size.
        cluster: the blocks of a cluster, an int or a tuple like grid and block; None: as the kernel requires, or 1.
        programmatic: the kernel may start before earlier ones of its stream have ended.
        """
        code = _parse(self._host, text, kernel)
        parameters = bytearray()
        if len(arguments) != len(code.parameters):
            raise ValueError(
                f"emulator: {kernel} has {len(code.parameters)} parameters, got {len(arguments)} arguments"
            )
        for argument, (offset, size) in zip(arguments, code.parameters, strict=True):
            parameters += bytes(offset - len(parameters)) + _pack(argument, size)
        cluster = code.required_cluster if cluster is None else cluster
        sizes = ((value,) if isinstance(value, int) else tuple(value) for value in (grid, block, cluster))
        grid, block, cluster = sizes
        with self:
            self._host.run(code, grid, block, shared, bytes(parameters), cluster, programmatic)

    def ptx_texts(self):
        """The PTX files of the build; launches take their kernels from them."""
        return [path.read_text() for path in build.ptx_files()]

    @contextlib.contextmanager
    def replaced(self, entry, text):
        """In the block, launches of the kernel `entry` (its mangled name) run the kernel of another PTX text."""
        self._host.replace_kernel(entry, self._host.parse(text, entry))
        try:
            yield
        finally:
            self._host.replace_kernel(entry, None)

    def assert_clean(self):
        """Fail with all reports so far, if there are any."""
        if self.reports:
            raise AssertionError("\n".join([f"emulator: {len(self.reports)} reports", *map(repr, self.reports)]))


@functools.lru_cache(maxsize=64)
def _parse(host, text, kernel):
    return host.parse(text, kernel)


def _pack(argument, size):
    """The bytes of a kernel's argument."""
    if isinstance(argument, DeviceTensor):
        argument = argument.data_ptr()
    if isinstance(argument, int):
        return (argument % 2 ** (8 * size)).to_bytes(size, "little")
    if isinstance(argument, float):
        return struct.pack({4: "<f", 8: "<d"}[size], argument)
    packed = bytes(argument)
    if len(packed) != size:
        raise ValueError(f"emulator: an argument of {size} bytes, got {len(packed)}")
    return packed


class EmulatedExtension:
    """`andromeda._C` for CPU tensors: every call runs on an emulator, with copies of its tensors, and must be clean.

    A tensor that the function does not write is read-only. Writing between the elements of a strided result is also an
    error.
    """

    # Names of the tensors that functions write, in every operation.
    _WRITTEN_ALWAYS = frozenset({"partials", "semaphores"})
    _WRITTEN_FORWARD = frozenset({"out", "softmax_lse", "q_out", "k_out", "y", "shifted"})
    _WRITTEN_BACKWARD = frozenset({"dq", "dk", "dv", "dx", "dresidual"})

    def __init__(self, emulator):
        self._emulator = emulator

    def __getattr__(self, name):
        value = getattr(self._emulator.extension, name)
        if not callable(value) or name.endswith("_is_usual"):  # such a function reads no values
            return value
        return functools.partial(self._call, name, value)

    def _is_written(self, function, tensor):
        by_pass = self._WRITTEN_BACKWARD if function.endswith("_backward") else self._WRITTEN_FORWARD
        return tensor in self._WRITTEN_ALWAYS or tensor in by_pass or tensor.endswith("_partial")

    def _call(self, name, function, *args, **kwargs):
        kwargs |= zip(_argument_names(function), args, strict=False)
        given = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        copies = {
            key: self._emulator.tensor(value, name=key, writable=self._is_written(name, key))
            for key, value in given.items()
        }
        with self._emulator:
            result = function(**kwargs | copies)
        self._emulator.assert_clean()
        for key, value in given.items():
            if self._is_written(name, key):
                _copy_back(copies[key], value, f"{name}: {key}")
        return result


@functools.cache
def _argument_names(function):
    """The names of the arguments of a binding, from the first line of its documentation, "f(q: torch.Tensor, ...)"."""
    return re.findall(r"(\w+): ", function.__doc__.splitlines()[0])


def _copy_back(copy, target, name):
    """Copy the elements of `target` from the device; the memory between them must be unchanged."""
    target = target.detach()
    target.copy_(copy.memory)
    elements = _span_of(target.shape, target.stride())
    if elements > target.numel():
        before = target.as_strided((elements,), (1,)).contiguous().view(torch.uint8)
        if not torch.equal(before, copy._span().view(torch.uint8)):
            raise AssertionError(f"emulator: {name} was written between its elements")
