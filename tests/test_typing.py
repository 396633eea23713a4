"""Types: every function of the package is annotated, users' type checkers see this, and repeated signatures agree."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import andromeda
from andromeda import Andromeda, AutoregressiveWrapper, generation

PACKAGE = Path(andromeda.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")])
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def unannotated(tree: ast.AST) -> list[str]:
    """The arguments and results without an annotation in a module, as `line: function: names`."""
    methods = {
        function: 0 if any("staticmethod" in ast.dump(decorator) for decorator in function.decorator_list) else 1
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for function in owner.body
        if isinstance(function, FUNCTIONS)
    }
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, FUNCTIONS):
            continue
        arguments = function.args
        positional = (*arguments.posonlyargs, *arguments.args)[methods.get(function, 0) :]  # without self and cls
        given = (*positional, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg)
        names = [argument.arg for argument in given if argument is not None and argument.annotation is None]
        if function.returns is None and function.name != "__init__":
            names.append("return")
        if names:
            found.append(f"{function.lineno}: {function.name}: {', '.join(names)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_everything_is_annotated(path):
    assert unannotated(ast.parse(path.read_text())) == []


def test_it_sees_what_is_missing():
    source = """
class A:
    def __init__(self, a: int, *rest): ...
    @staticmethod
    def s(a, b: int) -> None: ...
    @classmethod
    def c(cls, *, k=1, **more: int): ...
def f(a: int) -> None:
    def g(b): ...
"""
    expected = ["3: __init__: rest", "5: s: a", "7: c: k, return", "9: g: b, return"]
    assert sorted(unannotated(ast.parse(source))) == expected


def test_the_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert '"py.typed"' in project and '"Typing :: Typed"' in project


def test_generate_has_one_signature():
    """The methods repeat the arguments of `andromeda.generation.generate`, in its order and with its defaults."""
    net, *expected, pad_value = inspect.signature(generation.generate).parameters.values()
    assert (net.name, pad_value.name) == ("net", "pad_value")  # which the objects have themselves
    for owner in (Andromeda, AutoregressiveWrapper):
        _, *found = inspect.signature(owner.generate).parameters.values()
        assert found == expected


# ---- what type checkers know of calls

# torch is a stub here: checking the real one takes half a minute.
TORCH = """
from typing import Any
class Tensor: ...
def __getattr__(name: str) -> Any: ...
"""

CALLS = """
from torch import Tensor
from andromeda.ops import Backend
from andromeda.ops.attention import attention

def call(q: Tensor, with_lse: bool, backend: Backend) -> None:
    reveal_type(attention(q, q, q))
    reveal_type(attention(q, q, q, return_lse=False, backend=backend))
    reveal_type(attention(q, q, q, return_lse=True, backend="cpu"))
    reveal_type(attention(q, q, q, return_lse=with_lse, backend=None))
    attention(q, q, q, backend="cudnn")
    attention(q, q, q, dropout=0.5)
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(source): the lines that mypy prints of a file, without its name."""
    pytest.importorskip("mypy")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.pyi").write_text(TORCH)
    monkeypatch.setenv("MYPYPATH", f"{tmp_path}:{PACKAGE.parent}")

    def run(source):
        (tmp_path / "calls.py").write_text(source)
        options = ["--follow-imports=silent", "--no-site-packages", "--ignore-missing-imports", "--config-file="]
        command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={tmp_path / 'cache'}", "calls.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert not done.stderr
        return re.findall(r"^calls\.py:\d+: (.*)$", done.stdout, re.MULTILINE)

    return run


def test_return_lse_decides_the_type_of_the_result(check):
    lines = check(CALLS)
    revealed = [line.split('"')[1].replace("builtins.", "") for line in lines if "Revealed type" in line]
    one, both = "torch.Tensor", "tuple[torch.Tensor, torch.Tensor]"
    assert revealed == [one, one, both, f"{one} | {both}"]
    errors = "\n".join(line for line in lines if line.startswith("error:"))
    assert 'argument types "Tensor", "Tensor", "Tensor", "str"' in errors
    assert 'Unexpected keyword argument "dropout"' in errors
