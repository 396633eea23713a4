"""Who may know whom: the layers of the package and the folders of csrc, read from the sources."""

import ast
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
MODULES = sorted(PACKAGE.rglob("*.py"))
CPP_SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".in"))

# A layer may import itself and the layers before it; `data` only itself and `files`, and the last two alone use it.
LAYERS = ("files", "reference", "ops", "model", "huggingface", "training", "commands")
LAYER_OF = {
    **dict.fromkeys(("config", "generation", "checkpoint", "model"), "model"),
    **dict.fromkeys(
        ("packing", "tokenizer", "decoding", "columns", "folders", "readers", "documents", "dataset"), "data"
    ),
    **dict.fromkeys(("__init__", "__main__", "cli"), "commands"),
}

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
    """First names below andromeda of all that a file imports, also inside functions; public names as `__init__`."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, below = name.partition(".")
            if package == "andromeda":
                head = below.partition(".")[0]
                known = (PACKAGE / head).exists() or (PACKAGE / f"{head}.py").exists() or head == "_C"
                yield head if head and known else "__init__"


def may_import(layer, target):
    if target == "_C":
        return layer == "ops"
    if "data" in (layer, target):
        return layer == target or target == "files" or layer in ("training", "commands")
    return LAYERS.index(target) <= LAYERS.index(layer)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_python_layers(path):
    head = path.relative_to(PACKAGE).with_suffix("").parts[0]
    layer = LAYER_OF.get(head, head)
    for name in imported(path):
        assert may_import(layer, LAYER_OF.get(name, name)), f"{layer} imports {name}"


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
    tested_together = {"configuration_andromeda": "huggingface", "modeling_andromeda": "huggingface"}
    stems = {path.stem for path in MODULES} - {"__init__", "__main__"}
    expected = {f"test_{tested_together.get(stem, stem.lstrip('_'))}.py" for stem in stems}
    assert expected <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("spelling", ["andromeda", "Andromeda"])
def test_import_is_light(spelling):
    heavy = {"transformers", "datasets", "tokenizers", "accelerate", "matplotlib", "x_transformers", "pandas"}
    code = (
        "import sys, torch; before = set(sys.modules)\n"  # what torch itself loads is not ours
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


@pytest.mark.parametrize("name", ["attention", "qk_norm_rotary", "token_shift_norm"])
def test_an_operation_does_not_hide_its_module(name):
    module = importlib.import_module(f"andromeda.ops.{name}")
    assert getattr(andromeda.ops, name) is module
    if name in andromeda.__all__:
        assert getattr(andromeda, name) is getattr(module, name)
