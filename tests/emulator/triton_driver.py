"""A GPU for Triton that is not there: launches of Triton's JIT with CPU tensors run in the emulator.

    with triton_driver.active(Emulator(device="H200")) as emulator:
        kernel[(3, 2)](out, x, 17, 0.5, kBlock=64, num_warps=4)  # CPU tensors
    emulator.launches[-1].grid

Triton compiles for the device of `emulator.settings` and launches as it does on a card; only the driver, the object
that Triton asks for devices, loads and launches, is the one below. Each tensor of a launch becomes guarded memory that
begins and ends with its elements, read-only unless the kernel has a store through this argument (`written_parameters`
reads that from the PTX). The run must be clean, and afterwards the written elements are copied back.

Proven this way: what an operator launches, with which grids, arguments and options; the JIT's specialisation, its keys
and caches; the limit of shared memory; the PTX. Not proven, because only a card runs it: the machine code that ptxas
makes of the PTX, Triton's C stub that packs arguments and calls the driver, `cuModuleLoadData`, streams, and everything
on AMD. The stub's work, packing and dropping constants, is repeated here (`Launcher`).
"""

import contextlib
import functools
import itertools
import re
from pathlib import Path

import torch

from emulator import DEVICES, DeviceTensor, Emulator, _copy_back

# Triton omits a fence of the proxies between cp.async and wgmma. The hardware does not seem to need it.
ALLOWED_REPORT = ("proxy", "wgmma")
_devices = {}  # Device -> the index under which Triton keeps its kernels; a kernel of one device is not used for others


@contextlib.contextmanager
def active(emulator: Emulator):
    """In the block, Triton's GPU is the one of `emulator.settings`; it may change between launches."""
    with installed(EmulatedDriver(emulator)):
        yield emulator


@contextlib.contextmanager
def installed(fake):
    """In the block, `fake` is Triton's driver."""
    from triton.runtime import driver

    before = dict(vars(driver))
    driver.set_active(fake)
    try:
        yield fake
    finally:
        vars(driver).update(before)


class CompilingDriver:
    """Compiles what the JIT would compile for a device, and launches nothing.

    compiled: hash -> (source, metadata) of each program.
    """

    _indices = itertools.count(1000)

    def __init__(self, backend, architecture):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(backend, architecture, 64 if backend == "hip" else 32)
        self.index = next(self._indices)  # the JIT keeps programs by device
        self.compiled = {}
        self.utils = self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.index

    def get_current_stream(self, index):
        return 0

    def get_device_properties(self, index):
        return {"max_shared_mem": 2**30, "multiprocessor_count": 100}  # a limit would hide by how much it is exceeded

    def load_binary(self, name, binary, shared, index):
        return None, name, 0, 0, 2**30

    def launcher_cls(self, source, metadata):
        self.compiled[metadata.hash] = source, metadata
        return lambda *arguments: None


class EmulatedDriver:
    """What Triton asks of a driver."""

    def __init__(self, emulator: Emulator):
        self.emulator = emulator
        self.utils = self
        self.launcher_cls = launcher

    @property
    def device(self):
        given = self.emulator.settings.device
        return DEVICES[given] if isinstance(given, str) else given

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * self.device.major + self.device.minor, 32)

    def get_current_device(self):
        return _devices.setdefault(self.device, len(_devices))

    def get_current_stream(self, index):
        return 0

    def get_device_capability(self, index):
        return self.device.major, self.device.minor

    def get_device_properties(self, index):
        return {
            "max_shared_mem": 1024 * self.device.shared_per_block,
            "multiprocessor_count": self.device.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name, binary, shared, index):
        """(module, function, registers, spills, most threads of a block). No module, because none is to be unloaded."""
        return None, name, 0, 0, 1024

    def launch(self, launcher, grid, arguments):
        """Run a kernel with copies of its tensors, and copy back what it writes."""
        emulator, written = self.emulator, launcher.written
        tensors = {i: value for i, value in enumerate(arguments) if isinstance(value, torch.Tensor)}
        places = {}  # a tensor that is given twice is one place in memory
        for i, tensor in tensors.items():
            places.setdefault(_place(tensor), []).append(i)
        given = list(arguments)
        for indices in places.values():
            tensor, name = tensors[indices[0]], launcher.names[indices[0]]
            _check_alignment(tensor, name)
            copy = emulator.tensor(tensor, name=name, writable=not written.isdisjoint(indices))
            for i in indices:
                given[i] = copy
        with emulator:
            emulator.run_ptx(launcher.ptx, launcher.name, grid, launcher.threads, given, launcher.shared)
        kind, word = ALLOWED_REPORT
        emulator.reports[:] = [report for report in emulator.reports if report.kind != kind or word not in report.text]
        emulator.assert_clean()
        for indices in places.values():
            if not written.isdisjoint(indices):
                _copy_back(given[indices[0]], tensors[indices[0]], f"{launcher.name}: {launcher.names[indices[0]]}")


def _place(tensor):
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _check_alignment(tensor, name):
    """The JIT reads the address of the CPU tensor; the copy must be aligned as that is."""
    offset = tensor.storage_offset() * tensor.dtype.itemsize
    if tensor.numel() > 0 and (tensor.data_ptr() - offset) % 16 != 0:
        raise AssertionError(
            f"emulator: the memory of {name} does not begin at a multiple of 16 bytes, as a GPU's does"
        )


@functools.lru_cache(maxsize=512)
def _launcher(hash_of_kernel, source_name, signature, metadata):
    return Launcher(hash_of_kernel, source_name, signature, metadata)


def launcher(src, metadata):
    """The launcher of a compiled kernel; Triton 3.4 asks for it before every launch."""
    facts = metadata.name, metadata.num_warps, metadata.num_ctas, metadata.shared, metadata.global_scratch_size
    return _launcher(metadata.hash, src.name, tuple(src.signature.items()), facts)


class Launcher:
    """A compiled kernel as Triton launches it: it takes the values of all arguments and passes those not constant."""

    def __init__(self, hash_of_kernel, source_name, signature, facts):
        self.name, num_warps, num_ctas, self.shared, scratch = facts
        if num_ctas != 1 or scratch:
            raise NotImplementedError(f"emulator: {self.name} needs clusters or scratch memory")
        self.ptx = cached_file(hash_of_kernel, source_name, "ptx").read_text()
        self.threads = 32 * num_warps
        self.passed = [(i, name, kind) for i, (name, kind) in enumerate(signature) if kind != "constexpr"]
        self.names = [name for _, name, _ in self.passed]
        self.num_parameters, self.written = written_parameters(self.ptx, self.name)

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        from triton.runtime import driver

        if x * y * z == 0:
            return
        if x >= 2**31 or max(y, z) >= 2**16:
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a grid of {x} x {y} x {z}")
        values = [_checked(arguments[i], name, kind) for i, name, kind in self.passed]
        values += [0] * (self.num_parameters - len(values))  # scratch memory of the launch and of profiling
        driver.active.launch(self, (x, y, z), values)


def cached_file(hash_of_kernel, source_name, extension):
    """The file of a program with this extension in Triton's cache. A driver is handed the machine code only."""
    from triton.runtime.cache import get_cache_manager

    files = get_cache_manager(hash_of_kernel).get_group(f"{source_name[:150]}.json")
    return next(Path(path) for path in files.values() if path.endswith(f".{extension}"))


def _checked(value, name, kind):
    """An argument in a form that the emulator packs."""
    if kind.startswith("*"):
        if isinstance(value, DeviceTensor):  # the caller placed it, for instance a sparse one
            return value
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"emulator: pointer argument {name} must be a tensor, got {value!r}")
        if value.device.type != "cpu":
            raise ValueError(f"emulator: tensor {name} must be on the CPU, got {value.device}")
        return value
    if kind[0] in "iu":
        bits, value = int(kind[1:]), int(value)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if kind[0] == "i" and bits > 1 else (0, 2**bits)
        if not low <= value < high:
            raise OverflowError(f"emulator: argument {name} is {kind}, got {value}")
        return value
    if kind not in ("fp32", "fp64"):
        raise NotImplementedError(f"emulator: argument {name} of type {kind}")
    return float(value)


def written_parameters(ptx, name):
    """(number of parameters, indices of the pointers through which the kernel stores) of a kernel in PTX.

    Follows addresses from `ld.param` through arithmetic and moves: a register is connected with the parameters from
    which it was computed, at any point of the kernel. What is loaded from memory is not an address.
    """
    start = re.search(rf"\.entry\s+{re.escape(name)}\s*\(", ptx)
    header, _, body = ptx[start.end() :].partition(")")
    parameters = re.findall(r"\.param[^,]*", header)
    pointers = {i for i, parameter in enumerate(parameters) if ".ptr" in parameter}
    body = re.sub(r"//[^\n]*|^\s*\.loc\s[^\n]*", "", body[: body.find("\n}")], flags=re.MULTILINE)
    origins = {}  # register -> indices of parameters
    edges, stores = [], []
    for statement in re.split(r"[;{}]\s*\n|;", body):
        match = re.search(r"(?:^|\s)([a-z][\w.:]*)\s+(.*)", statement.strip().removeprefix("{"), re.DOTALL)
        if not match:
            continue
        opcode, operands = match.group(1), match.group(2)
        registers = re.findall(r"%[a-z]+\d+", operands)
        if opcode.startswith("ld.param"):
            index = re.search(rf"{re.escape(name)}_param_(\d+)", operands)
            origins.setdefault(registers[0], set()).add(int(index.group(1)))
        elif opcode.startswith(("st.", "red.", "atom.")):
            stores += re.findall(r"\[\s*(%[a-z]+\d+)", operands)
        elif registers and not opcode.startswith(("ld.", "setp.", "cp.async", "mma", "wgmma", "ldmatrix", "bar")):
            edges.append((registers[0], registers[1:]))
    changed = True
    while changed:
        changed = False
        for target, sources in edges:
            found = set().union(*(origins.get(source, ()) for source in sources))
            if not found <= origins.get(target, set()):
                origins[target] = origins.get(target, set()) | found
                changed = True
    return len(parameters), pointers & set().union(*(origins.get(register, ()) for register in stores))
