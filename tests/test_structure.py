"""Allowed imports between the parts of the package and the folders of csrc, read from the sources."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import Andromeda
import andromeda

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "andromeda"
CSRC = ROOT / "csrc"
TESTS = ROOT / "tests"
MODULES = sorted(PACKAGE.rglob("*.py"))
CPP_SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".in"))

# The parts of the package, its top-level modules and folders, lowest first, and the parts that each may import.
MAY_IMPORT = {
    "files": [],
    "reference": [],
    "config": [],
    "triton_kernels": [],
    "ops": ["reference", "triton_kernels"],
    "generation": ["config"],
    "checkpoint": ["files", "config"],
    "model": ["config", "ops", "generation", "checkpoint"],
    "huggingface": ["files", "config", "generation", "checkpoint", "model"],
    "data": ["files"],
    "training": ["files", "model", "huggingface", "data"],
    "__init__": ["ops", "model", "data"],
    "cli": ["files", "config", "ops", "data", "training", "__init__"],
    "__main__": ["cli"],
}
MOST_PARTS, MOST_LEVELS, MOST_IMPORTS = 14, 7, 29

# csrc: the folders whose headers a folder may include, besides its own.
MAY_INCLUDE = {"include": [], "cpu": ["include"], "cuda": ["include"], "bindings": ["include"], ".": ["include"]}
PRIVATE_HEADERS = {  # outside headers that belong to one folder
    "bindings": r"pybind11/|Python\.h",
    "cuda": r"cuda|cub/|cooperative_groups|mma\.h|nv",
    "nowhere": r"torch/|ATen/|c10/",
}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def imported(path):
    """The names in andromeda that a file imports, even inside functions: ("ops", "attention"); () for a public name."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *below = name.split(".")
            if package == "andromeda":
                yield tuple(below)


def module_of(names):
    """The module, as its names below andromeda, that an imported name is or belongs to."""
    while names and not (PACKAGE.joinpath(*names).with_suffix(".py")).is_file():
        if PACKAGE.joinpath(*names, "__init__.py").is_file():
            return (*names, "__init__")
        names = names[:-1]
    return names or ("__init__",)


def import_graph():
    """module -> the modules that it imports, each as its names below andromeda."""
    graph = {}
    for path in MODULES:
        module = path.relative_to(PACKAGE).with_suffix("").parts
        found = {module_of(names) for names in imported(path) if names[:1] != ("_C",)}
        graph[module] = found - {module}
    return graph


def part_graph():
    """part -> the parts that its modules import."""
    graph = {}
    for module, targets in import_graph().items():
        graph.setdefault(module[0], set()).update(target[0] for target in targets)
    return {part: targets - {part} for part, targets in graph.items()}


def levels(graph):
    """The number of parts on the longest path of imports; raises at a cycle."""
    height = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        height[name] = 1 + max((height[target] for target in graph[name]), default=0)
    return max(height.values())


def test_parts_import_only_parts_below():
    parts = list(MAY_IMPORT)
    assert all(parts.index(target) < parts.index(part) for part in parts for target in MAY_IMPORT[part])
    wrong = [(part, target) for part, targets in part_graph().items() for target in targets - {*MAY_IMPORT[part]}]
    assert wrong == []
    assert [path for path in MODULES if ("_C",) in imported(path) and path.parent.name != "ops"] == []


def test_the_package_is_small_enough_to_draw():
    graph = part_graph()
    assert len(graph) <= MOST_PARTS
    assert levels(graph) <= MOST_LEVELS
    assert sum(map(len, graph.values())) <= MOST_IMPORTS


@pytest.mark.parametrize("part", [part for part in MAY_IMPORT if (PACKAGE / part).is_dir()])
def test_no_cycle_inside_a_folder(part):
    graph = {module: targets for module, targets in import_graph().items() if module[0] == part}
    levels({module: {target for target in targets if target[0] == part} for module, targets in graph.items()})


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def project_header(path, name):
    """The file that an #include names, if it is one of csrc."""
    candidates = (path.parent / name, CSRC / "include" / name)
    return next((file for file in candidates if file.exists()), None)


@pytest.mark.parametrize("path", CPP_SOURCES, ids=relative)
def test_cpp_includes(path):
    folder = path.relative_to(CSRC).parts[0] if path.parent != CSRC else "."
    for name in includes(path):
        assert ".." not in name, "a header of another folder"
        if header := project_header(path, name):
            assert header.relative_to(CSRC).parts[0] in (folder, *MAY_INCLUDE[folder])
            continue
        for owner, pattern in PRIVATE_HEADERS.items():
            assert folder == owner or not re.match(pattern, name), f"{name} belongs to {owner}"


def test_every_module_has_its_test():
    """In the folder of the same name in tests/, or in tests/ itself."""
    tested_together = {"configuration_andromeda": "huggingface", "modeling_andromeda": "huggingface"}
    for path in MODULES:
        if path.stem not in ("__init__", "__main__"):
            name = f"test_{tested_together.get(path.stem, path.stem.lstrip('_'))}.py"
            places = (TESTS / name, TESTS / path.parent.relative_to(PACKAGE) / name)
            assert any(place.is_file() for place in places), f"{relative(path)} has no {name}"


@pytest.mark.parametrize("spelling", ["andromeda", "Andromeda"])
def test_import_is_light(spelling):
    heavy = {"transformers", "datasets", "tokenizers", "accelerate", "matplotlib", "x_transformers", "pandas"}
    code = (
        "import sys, torch; before = set(sys.modules)\n"  # modules that torch itself loads do not count
        f"from {spelling} import Andromeda, attention\n"
        f"print(sorted({heavy!r} & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", andromeda.__all__)
def test_both_spellings_give_the_same_object(name):
    assert getattr(Andromeda, name) is getattr(andromeda, name)


@pytest.mark.parametrize("module", [andromeda, Andromeda], ids=lambda module: module.__name__)
def test_unknown_names_are_attribute_errors(module):
    with pytest.raises(AttributeError, match="has no attribute 'Andromedar'"):
        module.Andromedar  # noqa: B018
    assert not hasattr(Andromeda, "__path__"), "Andromeda.model would be a second copy of andromeda.model"


@pytest.mark.parametrize(
    "name", ["attention", "qk_norm_rotary", "token_shift_norm", "linear_cross_entropy", "feed_forward"]
)
def test_an_operation_does_not_hide_its_module(name):
    module = importlib.import_module(f"andromeda.ops.{name}")
    assert getattr(andromeda.ops, name) is module
    if name in andromeda.__all__:
        assert getattr(andromeda, name) is getattr(module, name)
