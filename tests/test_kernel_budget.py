"""The CUDA kernels as compiled: registers, memory, instructions, blocks per multiprocessor, architectures.

Reads the object code in the built library with NVIDIA's disassembler and needs no GPU. The limits are in
kernel_budget.toml. To print what the kernels of the library, or of another file, use:

    python tests/test_kernel_budget.py [FILE]
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import emulator.build
import pytest
import sass_clocks
import torch

from andromeda import _C, attention, qk_norm_rotary
from andromeda.ops import _select
from andromeda.ops.token_shift_norm import token_shift_norm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BUDGET = tomllib.loads((TESTS / "kernel_budget.toml").read_text())
EVERY = BUDGET.pop("every")
# The devices that run the code of an architecture. 8.6 and 8.9 take the code of 8.0.
DEVICES = {"sm_80": ("A100", "RTX 3090", "L4"), "sm_90a": ("H200",)}
DTYPES = (torch.float16, torch.bfloat16)
NEVER_LAUNCHED = "probe"  # of csrc/cuda/cuda_status.cu, which only loads it


# ---- tools ----------------------------------------------------------------------------------------------------------


def missing(reason):
    """Skip the test, or fail it in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def places(folder):
    """The folders for NVIDIA's programs (bin) or headers (include): of the toolkit, its wheels, Triton's wheel."""
    homes = [os.environ.get("CUDA_HOME") or "/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"))]
    for package, below in (("nvidia", "cu*"), ("triton", "backends/nvidia")):
        if spec := importlib.util.find_spec(package):
            homes += [home for place in spec.submodule_search_locations for home in sorted(Path(place).glob(below))]
    return [Path(home) / folder for home in homes]


def find_cuobjdump(path):
    """The first program that can read all of a file, or None: a program older than the file's CUDA often cannot.

    It calls nvdisasm, which must have the same version, so it is taken from the same folder.
    """
    for folder in [*places("bin"), *map(Path, os.get_exec_path())]:
        if all(shutil.which(name, path=folder) for name in ("cuobjdump", "nvdisasm")):
            command = [folder / "cuobjdump", "--dump-elf", path]
            if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
                return folder / "cuobjdump"
    return None


NO_CUOBJDUMP = (
    "no cuobjdump with nvdisasm beside it that reads the object code: "
    "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
)


def output_of(*command, **options):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command[0]} failed:\n{result.stderr}"
    return result.stdout


# ---- object code ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Kernel:
    registers: int  # per thread, at the start
    local: int  # bytes per thread: spills, and arrays that are indexed at run time
    static_shared: int  # bytes per block
    max_threads: int = 0  # per block, of __launch_bounds__; 0: not given
    barriers: int = 1  # of a block's 16; a multiprocessor has two for each block that it can hold
    instructions: Counter = dataclasses.field(default_factory=Counter)  # opcode with its modifiers -> how many
    highest: int = 0  # registers up to the highest that an instruction names: after setmaxnreg there are others
    loops: list[sass_clocks.Loop] = dataclasses.field(default_factory=list)  # over tiles, where wgmma multiplies them

    def count(self, prefix):
        """Instructions of this opcode, whatever modifiers follow: "MUFU.EX2" or "HMMA"."""
        return sum(number for opcode, number in self.instructions.items() if f"{opcode}.".startswith(f"{prefix}."))


def split_by_code(listing):
    """(kind, architecture, source, text) of each piece of device code in what cuobjdump prints; kind: elf or ptx."""
    for piece in listing.split("\nFatbin ")[1:]:
        kind = re.match(r"(elf|ptx) code:", piece).group(1)
        architecture = re.search(r"^arch = (\w+)$", piece, re.MULTILINE).group(1)
        source = re.search(r"^identifier = (.*)$", piece, re.MULTILINE)
        yield kind, architecture, source.group(1) if source else "", piece


def readable(demangled):
    """The short name "f<bf16,0>" of "void andromeda::cuda::f_kernel<__nv_bfloat16, (Access)0>(Params)"."""
    name = re.sub(r"^void |\(andromeda::[\w:]+\)|andromeda::(cuda::)?|\(anonymous namespace\)::", "", demangled)
    name = re.sub(r"\(.*", "", name).replace("_kernel", "", 1).replace(" ", "")
    for cpp, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        name = name.replace(cpp, short)
    return name


def read_kernels(cuobjdump, path):
    """{(architecture, readable name): Kernel} of the object code in a file."""

    def code(option):
        listing = output_of(cuobjdump, option, path)
        return [(architecture, text) for kind, architecture, _, text in split_by_code(listing) if kind == "elf"]

    kernels = {}
    usage = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for architecture, text in code("--dump-resource-usage"):
        # From 9.0 on, the 1 KiB that the driver keeps is counted as the kernel's own.
        reserved = 1024 if int(re.search(r"\d+", architecture).group()) >= 90 else 0
        for symbol, *numbers in re.findall(usage, text):
            registers, stack, shared, local = map(int, numbers)
            assert (architecture, symbol) not in kernels, f"{symbol} was compiled twice for {architecture}"
            kernels[architecture, symbol] = Kernel(registers, stack + local, max(shared - reserved, 0))

    for architecture, text in code("--dump-sass"):
        for symbol, instructions in sass_clocks.parse(text).items():
            kernel = kernels[architecture, symbol]
            kernel.instructions.update(instruction.opcode for instruction in instructions)
            kernel.highest = sass_clocks.highest_register(instructions)
            if kernel.count("HGMMA"):
                kernel.loops = sass_clocks.tile_loops(instructions)

    bounds = re.compile(r"EIATTR_MAX_THREADS\s+Format:\s+EIFMT_SVAL\s+Value:\s+(0x\w+)\s+(0x\w+)\s+(0x\w+)")
    barriers = re.compile(r"EIATTR_NUM_BARRIERS\s+Format:\s+EIFMT_BVAL\s+Value:\s+(0x\w+)")
    for architecture, text in code("--dump-elf"):
        for section in re.split(r"\n\.nv\.info\.", text)[1:]:
            symbol = section.split(None, 1)[0]
            if found := barriers.search(section):
                kernels[architecture, symbol].barriers = int(found.group(1), 16)
            if found := bounds.search(section):
                kernels[architecture, symbol].max_threads = math.prod(int(size, 16) for size in found.groups())

    demangle = shutil.which("c++filt") or missing("no c++filt (binutils)")
    names = output_of(demangle, input="\n".join(symbol for _, symbol in kernels)).splitlines()
    named = {(where, readable(name)): kernels[where, key] for (where, key), name in zip(kernels, names, strict=True)}
    assert len(named) == len(kernels), f"two kernels share a name: {sorted(names)}"
    return {key: kernel for key, kernel in named.items() if key[1] != NEVER_LAUNCHED}


# ---- the library ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cuobjdump():
    if not _C.build_info()["cuda_architectures"]:
        missing("the library was built without CUDA")
    return find_cuobjdump(_C.__file__) or missing(NO_CUOBJDUMP)


@pytest.fixture(scope="session")
def kernels(cuobjdump):
    return read_kernels(cuobjdump, _C.__file__)


def in_library(architecture):
    """Skips the test where the library has no code for this architecture: a user may have left it out."""
    if ("elf", architecture) not in promised():
        missing(f"the library was built for {', '.join(_C.build_info()['cuda_architectures'])}, not for {architecture}")


def promised(source=""):
    """The code for the architectures, in CMake's spelling: "80" requests {("elf", "sm_80"), ("ptx", "sm_80")}."""
    if "hopper" in Path(source).parts:
        return {("elf", "sm_90a")}
    content = set()
    for name in _C.build_info()["cuda_architectures"]:
        number, _, only = name.partition("-")
        content |= {
            (kind, f"sm_{number}") for kind in ("elf", "ptx") if only != {"elf": "virtual", "ptx": "real"}[kind]
        }
    return content


def test_library_holds_the_promised_architectures(cuobjdump):
    content = {}
    for kind, architecture, source, _ in split_by_code(output_of(cuobjdump, "--dump-resource-usage", _C.__file__)):
        content.setdefault(source, set()).add((kind, architecture))
    assert content, "no device code in the library"
    for source, found in content.items():
        assert found == promised(source), source


def test_library_needs_no_cuda_library():
    """An import must work without a driver. Linking libpython or torch would tie the library to one version."""
    if not (readelf := shutil.which("readelf")):
        missing("no readelf (binutils)")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of(readelf, "--wide", "--dynamic", _C.__file__))
    assert needed
    system = r"(lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt|c\+\+|c\+\+abi|unwind)|ld-linux[\w-]*)\.so\.\d+"
    assert [name for name in needed if not re.fullmatch(system, name)] == []


def test_library_asks_for_no_other_symbols():
    if not (nm := shutil.which("nm")):
        missing("no nm (binutils)")
    symbols = [line.split() for line in output_of(nm, "--dynamic", "--undefined-only", _C.__file__).splitlines()]
    # Of Python, or of a versioned system library. A weak one (w) may stay undefined.
    known = r"_?Py\w+|\w+@+(GLIBC|GLIBCXX|CXXABI|GCC)_.*"
    assert [name for kind, name in symbols if kind != "w" and not re.fullmatch(known, name)] == []


# ---- clocks of shared memory ----------------------------------------------------------------------------------------


def pretend(emulated, device):
    """Let the emulated GPU be another one. Plans are kept for a device's number, which stays the same."""
    emulated.settings.device = device
    _select.plans.clear()


def attention_launches(emulated, seqlen_q, seqlen_k, head_dim, dtype):
    """{kernel: its launch} of a call and its gradient: one head, no mask, so that all pairs of tiles cost the same."""
    has_gradient = head_dim <= 128
    q = torch.randn(1, seqlen_q, 1, head_dim, dtype=dtype, requires_grad=has_gradient)
    k, v = torch.randn(2, 1, seqlen_k, 1, head_dim, dtype=dtype).requires_grad_(has_gradient).unbind()
    emulated.launches.clear()
    out = attention(q, k, v, backend="cuda")
    if has_gradient:
        out.sum().backward()
    return {readable(launch.kernel): launch for launch in emulated.launches}


def test_clocks_of_shared_memory(emulated):
    """The clocks in which loops occupy shared memory, 128 bytes each: operands, copies, values of rows.

    They are counted while the loops run, with bank conflicts: the cost of 64 more queries (dkdv) or keys for 64 of the
    others. More clocks than the limit are slower; with fewer, the limit must be lowered.
    """
    limited = {entry for entry, limits in BUDGET.items() if "shared_clocks" in limits}
    emulated.settings.check, measured = False, set()
    cases = [*itertools.product(("A100", "L4", "H200"), DTYPES, (64, 128)), ("H200", torch.bfloat16, 256)]
    for device, dtype, head_dim in cases:
        pretend(emulated, device)
        shapes = ((384, 256), (768, 256), (384, 512))  # whole tiles of every kernel
        few, queries, keys = (attention_launches(emulated, *shape, head_dim, dtype) for shape in shapes)
        for name, launch in few.items():
            (entry,) = (entry for entry in BUDGET if fnmatchcase(name, entry))
            if entry in limited:
                more = queries if "dkdv" in name else keys
                clocks = more[name].counters.shared_clocks - launch.counters.shared_clocks
                per_pair, limit = clocks / (384 * 256 / 64**2), BUDGET[entry]["shared_clocks"]
                assert 0.97 * limit <= per_pair <= limit, f"{name} on {device}: {per_pair} clocks per 64 x 64 pair"
                measured.add(entry)
    assert measured == limited, "entries whose kernels were not launched"


# ---- the budget -----------------------------------------------------------------------------------------------------


@functools.cache
def limits_of(entry, architecture):
    """The limits of kernel_budget.toml: for every kernel, for this one, and for this one on this architecture."""
    layers = (EVERY, BUDGET[entry], BUDGET[entry][architecture])
    limits = {key: value for layer in layers for key, value in layer.items() if key not in DEVICES}
    limits.pop("shared_clocks", None)  # of the kernels that have it: test_clocks_of_shared_memory
    limits["require"] = {key: value for layer in layers for key, value in layer.get("require", {}).items()}
    limits.setdefault("max_threads", limits["threads"])
    limits.setdefault("highest", limits["registers"])
    limits.setdefault("clocks", {})
    known = {"registers", "highest", "local", "shared", "threads", "max_threads", "min_blocks", "require", "forbid"}
    known |= {"clocks"}
    assert set(limits) == known, f"{entry}, {architecture}: keys that differ: {sorted(set(limits) ^ known)}"
    return limits


def covered(kernels, entry, architecture):
    """The kernels of the library that an entry names: [(name, Kernel)]."""
    in_library(architecture)
    found = [(name, kernel) for (where, name), kernel in kernels.items() if where == architecture]
    return [(name, kernel) for name, kernel in found if fnmatchcase(name, entry)]


every_entry = pytest.mark.parametrize(
    ("entry", "architecture"),
    [(entry, architecture) for entry in BUDGET for architecture in DEVICES if architecture in BUDGET[entry]],
)


@pytest.mark.parametrize("architecture", DEVICES)
def test_every_kernel_has_one_entry(kernels, architecture):
    in_library(architecture)
    for name in [name for where, name in kernels if where == architecture]:
        entries = [entry for entry in BUDGET if fnmatchcase(name, entry) and architecture in BUDGET[entry]]
        assert len(entries) == 1, f"{name} must have one entry in kernel_budget.toml, has {entries}"


@every_entry
def test_every_entry_has_a_kernel(kernels, entry, architecture):
    assert covered(kernels, entry, architecture), f"no kernel {entry} in the library: {sorted(kernels)}"


def check_registers_and_memory(name, kernel, limits, ptxas):
    made_by = f"{name}, made by ptxas {ptxas}"
    assert kernel.registers <= limits["registers"], made_by
    assert kernel.highest <= limits["highest"], made_by
    assert kernel.local <= limits["local"], made_by
    assert kernel.max_threads in (0, limits["max_threads"]), (
        f"{name}: __launch_bounds__ is not as in kernel_budget.toml"
    )


def check_instructions(name, kernel, limits):
    short = {op: kernel.count(op) for op, least in limits["require"].items() if kernel.count(op) < least}
    assert not short, f"{name} has too few {short}, of {limits['require']}"
    present = {op: kernel.count(op) for op in limits["forbid"] if kernel.count(op)}
    assert not present, f"{name} has {present}"


def check_clocks(name, kernel, limits, ptxas):
    """Of the loop over tiles with the least work besides the products: a bounded softmax without a mask."""
    if not limits["clocks"]:
        assert not kernel.loops, f"{name} has a loop over tiles, and no limits for its clocks"
        return
    allowed = dict(limits["clocks"])
    queries, keys = allowed.pop("tile")
    clocks = dataclasses.asdict(kernel.loops[0].clocks.scaled(128 * 128 / (queries * keys)))
    assert allowed.keys() == clocks.keys(), f"{name} needs limits of {sorted(clocks)}"
    made_by = f"{name}, made by ptxas {ptxas}: {clocks} for 128 x 128 pairs, of {allowed}"
    assert clocks["tensor"] == allowed["tensor"], made_by
    assert all(clocks[what] <= allowed[what] for what in clocks), made_by


def check_blocks(name, kernel, limits, occupancy):
    """Too few blocks do not hide latency; with none the launch fails."""
    use = f"{kernel.registers} {limits['threads']} {kernel.static_shared} {limits['shared']} {kernel.barriers}"
    blocks = occupancy([f"{use} {device}" for device in limits["min_blocks"]])
    for (device, least), number in zip(limits["min_blocks"].items(), blocks, strict=True):
        assert number >= max(least, 1), f"{name} on {device}: {use} (registers, threads, shared memory, barriers)"


@every_entry
def test_registers_and_memory(kernels, entry, architecture):
    for name, kernel in covered(kernels, entry, architecture):
        check_registers_and_memory(name, kernel, limits_of(entry, architecture), _C.build_info()["ptxas"])


@every_entry
def test_instructions(kernels, entry, architecture):
    for name, kernel in covered(kernels, entry, architecture):
        check_instructions(name, kernel, limits_of(entry, architecture))


@pytest.fixture(scope="session")
def occupancy(tmp_path_factory):
    """occupancy(lines) -> numbers: the compiled occupancy.cpp."""
    compiler = shutil.which("g++") or shutil.which("clang++") or missing("no C++ compiler on the path")
    folder = next((folder for folder in places("include") if (folder / "cuda_occupancy.h").exists()), None)
    if folder is None:
        missing("no cuda_occupancy.h: install triton, or the headers of the CUDA toolkit")
    program = tmp_path_factory.mktemp("occupancy") / "occupancy"
    output_of(compiler, "-std=c++17", "-isystem", folder, TESTS / "occupancy.cpp", "-o", program)
    return lambda lines: [int(number) for number in output_of(program, input="\n".join(lines)).split()]


@every_entry
def test_clocks_of_the_loop_over_tiles(kernels, entry, architecture):
    """Counted in the machine code (sass_clocks.py), for kernels whose tiles are multiplied by wgmma."""
    for name, kernel in covered(kernels, entry, architecture):
        check_clocks(name, kernel, limits_of(entry, architecture), _C.build_info()["ptxas"])


def clocks_table():
    """The lines of docs/attention.md#hopper: limits, and the rate at which the largest of them would be the time."""
    lines, leading = [], Counter()
    for entry, limits in BUDGET.items():
        if clocks := limits.get("clocks"):
            kernel, head_dim = re.fullmatch(r"hopper::attention_(\w+)_wgmma<\*,(\d+)>", entry).groups()
            needs = [clocks["tensor"], clocks["issue"], clocks["mufu"], 4 * limits["shared_clocks"]]  # of 128 x 128
            passes = kernel.partition("_")[0]
            leading[passes, head_dim] += max(needs)
            flops = {"forward": 2, "backward": 5}[passes] * 2 * 128 * 128 * int(head_dim)
            rate = 132 * 1.755e9 * flops / leading[passes, head_dim] / 1e12
            shown = f"{rate:.0f}" if kernel == "forward" else f"{rate:.0f}, with dq" if "dkdv" in kernel else ""
            lines.append(" | ".join([f"| {kernel}", head_dim, *map(str, needs), f"{shown} |"]))
    return lines


def test_the_page_shows_the_clocks():
    table = (ROOT / "docs/attention.md").read_text().split("**What a multiprocessor needs**")[1].split("\n\n")[1]
    assert table.splitlines()[2:] == clocks_table(), "write:\n" + "\n".join(clocks_table())


@every_entry
def test_blocks_per_multiprocessor(kernels, occupancy, entry, architecture):
    limits = limits_of(entry, architecture)
    assert set(limits["min_blocks"]) == set(DEVICES[architecture])
    for name, kernel in covered(kernels, entry, architecture):
        check_blocks(name, kernel, limits, occupancy)


def every_variant(emulated):
    """Calls that launch every kernel, with as little work as possible."""
    for dtype, head_dim in itertools.product(DTYPES, (64, 128)):
        # More rows than the decode kernel takes, and two heads of one key head whose gradients are added.
        q = torch.randn(1, 160, 2, head_dim, dtype=dtype, requires_grad=True)
        k, v = torch.randn(2, 1, 160, 1, head_dim, dtype=dtype).requires_grad_().unbind()
        # wgmma; mma.sync with two stages of keys in shared memory, and with one
        for device in ("H200", "L4", "A100"):
            pretend(emulated, device)
            attention(q, k, v, backend="cuda").sum().backward()
        if head_dim == 128:  # forward alone has a kernel for more
            pretend(emulated, "H200")
            q, k, v = (torch.randn(1, 160, 1, 256, dtype=dtype) for _ in range(3))
            attention(q, k, v, backend="cuda")
        for num_heads in (16, 32):  # of one key head: one group of 16 rows, or two
            q, k = torch.randn(1, 1, num_heads, head_dim, dtype=dtype), torch.randn(1, 512, 1, head_dim, dtype=dtype)
            for device in ("H200", "A100"):
                pretend(emulated, device)
                attention(q, k, k, backend="cuda")
    for dtype, head_dim in itertools.product((torch.float32, torch.float16, torch.bfloat16), (6, 64, 512)):
        q, k = torch.randn(2, 1, 2, 1, head_dim, dtype=dtype).requires_grad_().unbind()
        qk_norm_rotary(q, k, rotary_dim=4, backend="cuda")[0].sum().backward()
    for dtype, first in itertools.product((torch.float32, torch.float16, torch.bfloat16), (0, 1)):
        x = torch.randn(1, 1, 2561, dtype=dtype)[..., first : first + 2560].requires_grad_()
        token_shift_norm(x, gamma=torch.zeros(2560), backend="cuda")[0].sum().backward()


def test_launches_are_as_in_the_budget(emulated):
    """Threads and dynamic shared memory are not in object code; the numbers in kernel_budget.toml must be true."""
    every_variant(emulated)
    launched = set()
    for launch in emulated.launches:
        name = readable(launch.kernel)
        entry = next((entry for entry in BUDGET if fnmatchcase(name, entry)), None)
        assert entry, f"{name} has no entry in kernel_budget.toml"
        assert math.prod(launch.block) == BUDGET[entry]["threads"], name
        assert launch.shared_bytes <= BUDGET[entry]["shared"], name
        launched.add(entry)
    assert launched == set(BUDGET), "entries whose kernels were not launched"


# ---- with every ptxas -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def nvccs(tmp_path_factory):
    """{version of ptxas: an nvcc that runs it}: nvcc's own, then the newest available one if it is different."""
    setup_py = emulator.build._setup_py()
    nvcc = setup_py.find_nvcc(os.environ) or missing("no nvcc")
    folder, own = setup_py.read_toolkit(nvcc, os.environ)
    newest = setup_py.choose_ptxas({}, own, setup_py.available_ptxas(setup_py.build_tree(os.environ)))
    found = {str(own): str(Path(folder) / "nvcc")}
    if newest.version != own.version:
        found[str(newest)] = setup_py.nvcc_with(newest, folder, tmp_path_factory.mktemp("a toolkit"))
    return found


def another_ptxas(nvccs):
    """Skip the test if there is only one."""
    if len(nvccs) == 1:
        missing(f"no ptxas but nvcc's own {next(iter(nvccs))}: pip install {emulator.build._setup_py().PTXAS_WHEEL}")


def assemble(nvcc, ptx, architecture, folder):
    """Object code of a PTX file, with the flags of the project. Notes about slow code are errors, as in the build."""
    number, target = architecture.removeprefix("sm_"), folder / f"{architecture}_{ptx.stem}.fatbin"
    gencode = f"-gencode=arch=compute_{number},code={architecture}"
    command = [nvcc, "-fatbin", *_C.build_info()["cuda_flags"].split(), gencode, ptx, "-o", target]
    output_of("sh", ROOT / "csrc/cuda/nvcc.sh", nvcc, *command)
    return target


def assemble_all(nvcc, architectures, folder):
    """Like `read_kernels` of the library."""
    jobs = [(architecture, ptx) for architecture in architectures for ptx in compiled_ptx(architecture)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(lambda job: assemble(nvcc, job[1], job[0], folder), jobs))
        cuobjdump = find_cuobjdump(files[0]) or missing(NO_CUOBJDUMP)
        tables = pool.map(lambda file: read_kernels(cuobjdump, file), files)
        return {key: kernel for table in tables for key, kernel in table.items()}


def compiled_ptx(architecture):
    targets = ["80"] if architecture == "sm_80" else ["90a", "hopper"]
    return [ptx for target in targets for ptx in emulator.build.compile_ptx(target)]


def differences(kernel, other):
    """How two ptxas differ on the same PTX: "UIADD3 6 -> 14, registers 96 -> 104"; without padding of cache lines."""
    pairs = {
        field: (getattr(kernel, field), getattr(other, field)) for field in ("registers", "local", "static_shared")
    }
    opcodes = sorted((kernel.instructions.keys() | other.instructions.keys()) - {"NOP"})
    pairs |= {opcode: (kernel.instructions[opcode], other.instructions[opcode]) for opcode in opcodes}
    return ", ".join(f"{what} {before} -> {after}" for what, (before, after) in pairs.items() if before != after)


def difference_table(kernels, others):
    """One line for the kernels of an architecture with the same differences, then the number without any."""
    alike = {}
    for architecture, name in sorted(kernels):
        what = differences(kernels[architecture, name], others[architecture, name])
        alike.setdefault((architecture, what), []).append(name)
    same = sum(len(names) for (_, what), names in alike.items() if not what)
    lines = [f"  {where:7} {' '.join(names)}: {what}" for (where, what), names in alike.items() if what]
    return [*lines, f"  {same} of {len(kernels)} kernels: the same instructions, in number"]


def test_every_ptxas_keeps_the_budget(kernels, nvccs, occupancy, tmp_path):
    """The library's ptxas is judged by the tests above. Another one gets the PTX of the same kernels."""
    another_ptxas(nvccs)
    for architecture in DEVICES:
        in_library(architecture)
    kernels = {key: kernel for key, kernel in kernels.items() if key[0] in DEVICES}
    used = _C.build_info()["ptxas"]
    for version in nvccs.keys() - {used}:
        others = assemble_all(nvccs[version], DEVICES, tmp_path)
        assert others.keys() == kernels.keys(), "the library is not of these sources"
        emulator.build.announce("\n".join([f"ptxas {used} -> {version}:", *difference_table(kernels, others)]))
        for (architecture, name), kernel in others.items():
            (entry,) = (entry for entry in BUDGET if fnmatchcase(name, entry) and architecture in BUDGET[entry])
            limits = limits_of(entry, architecture)
            check_registers_and_memory(name, kernel, limits, version)
            check_instructions(name, kernel, limits)
            check_clocks(name, kernel, limits, version)
            check_blocks(name, kernel, limits, occupancy)


def test_the_library_names_its_ptxas(cuobjdump):
    listing = output_of(cuobjdump, "--dump-elf", _C.__file__)
    tools = {version for name, version in re.findall(r"Tool Name:\s+(\w+)\s+Tool Version:.* V([\d.]+)", listing)}
    assert tools == {_C.build_info()["ptxas"]}


# ---- errors that stop the build -------------------------------------------------------------------------------------

CLEAN = """
__global__ void clean(float* x) { x[threadIdx.x] *= 2.0f; }
"""
SPILL = """
constexpr int kCount = 160;  // of 64 registers that 1024 threads leave to each
__global__ void __launch_bounds__(1024) spill(float* x, int num_steps) {
  float kept[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  for (int step = 0; step < num_steps; ++step) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) kept[i] = kept[i] * kept[(i + 1) % kCount] + 1.0f;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i * 1024 + threadIdx.x] = kept[i];
}
"""
INDEXED = """
__global__ void indexed(float* x, int n) {
  float kept[16] = {};
  for (int i = 0; i < n; ++i) kept[n * i % 16] += x[i];
  x[0] = kept[n % 16];
}
"""
SERIALISED = """
// Accumulators of a wgmma in flight are used before its wait.
__global__ void __launch_bounds__(128) serialised(float* out, unsigned long long a, unsigned long long b) {
#if __CUDA_ARCH__ == 900
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  d[0] *= 2.0f;
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
#endif
}
"""
IGNORED = """
__global__ void ignored(float* x) {
#if __CUDA_ARCH__ == 900
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#endif
  x[threadIdx.x] = 1.0f;
}
"""


def find_tool(name):
    """A program of the build, next to this Python or on the path."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    return shutil.which(name, path=path) or missing(f"{name} is not installed")


class Project:
    """The project in another folder, with all its flags; there, a source can replace a kernel file."""

    SOURCE = Path("csrc/cuda/qk_norm_rotary.cu")

    def __init__(self, folder):
        self.folder, self.ninja = folder, find_tool("ninja")
        self.object = Path(f"CMakeFiles/cuda_kernels.dir/{self.SOURCE}.o")
        for name in ("csrc", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "CMakeLists.txt", folder)

    def configure(self, nvcc):
        """Configure the tree for a compiler, as setup.py does; returns CMake's messages."""
        pybind11 = pytest.importorskip("pybind11")
        return output_of(
            find_tool("cmake"), "--fresh", "-S", self.folder, "-B", self.folder / "build", "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={self.ninja}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={nvcc}",
            "-DANDROMEDA_CUDA_ARCHITECTURES=80;90a-real",
        )  # fmt: skip

    def compile(self, source):
        """(status, output) of the compiler."""
        (self.folder / self.SOURCE).write_text(source)
        command = [self.ninja, "-C", self.folder / "build", self.object]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return result.returncode, result.stdout


@pytest.fixture(scope="module", params=[0, 1], ids=["own ptxas", "newest ptxas"])
def compile_kernels(request, nvccs, tmp_path_factory):
    """compile_kernels(source) -> (status, output): compiles it in place of a kernel file, with the project's flags."""
    if request.param == 1:
        another_ptxas(nvccs)
    version, nvcc = list(nvccs.items())[request.param]
    project = Project(tmp_path_factory.mktemp("planted") / "a path with blanks")
    assert f"ptxas {version}" in project.configure(nvcc)
    return project.compile


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (SPILL, "Registers are spilled to local memory in function"),
        (INDEXED, "Local memory used for function"),
        (SERIALISED, "registers of a wgmma in flight are used before its wait"),
        (IGNORED, "__launch_bounds__ is missing"),
    ],
    ids=["spill", "local memory", "serialised wgmma", "setmaxnreg ignored"],
)
def test_slow_code_stops_the_build(compile_kernels, source, reason):
    status, output = compile_kernels(source)
    assert status != 0
    assert reason in output


def test_other_code_does_not_stop_the_build(compile_kernels):
    status, output = compile_kernels(CLEAN)
    assert status == 0, output


def test_a_change_of_ptxas_compiles_again(nvccs, tmp_path, monkeypatch):
    """Neither ninja nor ccache may reuse the output of one ptxas for another."""
    another_ptxas(nvccs)
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "cache"))
    project = Project(tmp_path / "a path with blanks")
    for version in [*nvccs, *nvccs]:
        project.configure(nvccs[version])
        status, output = project.compile(CLEAN)
        assert status == 0, output
        made = project.folder / "build" / project.object
        listing = output_of(find_cuobjdump(made) or missing(NO_CUOBJDUMP), "--dump-elf", made)
        assert set(re.findall(r"Tool Version:.* V([\d.]+)", listing)) == {version}


def main(path=_C.__file__):
    kernels = read_kernels(find_cuobjdump(path) or sys.exit(NO_CUOBJDUMP), path)
    for (architecture, name), kernel in sorted(kernels.items(), key=lambda item: item[0][::-1]):
        print(f"{name} {architecture}: {kernel.registers} registers, named up to {kernel.highest},", end=" ")
        print(f"{kernel.local} bytes local,", end=" ")
        print(f"{kernel.static_shared} bytes static shared, at most {kernel.max_threads} threads,", end=" ")
        print(f"{kernel.barriers} barriers")
        for loop in kernel.loops:
            print(f"    loop over tiles at {loop.address:#06x}: clocks {loop.clocks}")
        print("   ", ", ".join(f"{opcode} {number}" for opcode, number in sorted(kernel.instructions.items())))


if __name__ == "__main__":
    main(*sys.argv[1:])
