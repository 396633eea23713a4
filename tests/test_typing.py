"""What type checkers know of calls. torch is a stub here, because checking the real one takes half a minute."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

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
    monkeypatch.setenv("MYPYPATH", f"{tmp_path}:{ROOT}")

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
