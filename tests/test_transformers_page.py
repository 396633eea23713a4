"""docs/transformers.md is true: its blocks run, its commands exist, and what it calls refused is refused.

Blocks that begin with "# pip install" run in tests/ecosystem.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch

from andromeda.cli.main import make_parser

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "transformers.md"
TEXT = PAGE.read_text() if PAGE.exists() else ""
pytestmark = [
    pytest.mark.skipif(not TEXT, reason="the page is not part of this copy"),
    pytest.mark.filterwarnings("ignore"),
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.M | re.S)


PYTHON = [block for block in blocks("python") if not block.startswith("# pip install ")]
WITH_PACKAGES = [block for block in blocks("python") if block not in PYTHON]
COMMANDS = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
REFUSED = re.findall(r"^\| `([^|]*)` \|", TEXT.partition("## What is refused")[2], flags=re.M)


def name_of(code):
    """The heading that a piece of the page is under."""
    return re.findall(r"^#+ (.*)$", TEXT[: TEXT.index(code)], flags=re.M)[-1]


def execute(code, namespace):
    line = TEXT[: TEXT.index(code)].count("\n")  # so that a traceback shows the line of the page
    exec(compile("\n" * line + code, str(PAGE), "exec"), namespace)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """The names that the blocks of the page make, one after the other, in an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        torch.manual_seed(0)
        names = {"__name__": "page"}
        execute(PYTHON[0], names)
        yield names


@pytest.mark.parametrize("code", PYTHON[1:], ids=name_of)
def test_python_runs_as_it_stands(code, namespace):
    execute(code, namespace)


def test_it_is_a_page():
    assert len(TEXT.splitlines()) <= 200
    assert len(PYTHON) >= 5 and len(WITH_PACKAGES) >= 3 and len(REFUSED) >= 8


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[:1] == ["andromeda"]], ids=" ".join)
def test_commands_exist(words):
    make_parser().parse_args(words[1:])


@pytest.mark.parametrize("code", REFUSED)
def test_what_is_refused_is_refused(code, namespace):
    """By an error of this package."""
    if "packed" not in namespace:  # this test alone
        for block in PYTHON[1:3]:
            execute(block, namespace)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=r"Andromeda|attention:"):
        execute(code, namespace)


def test_target_modules_are_all_linear_maps_of_a_block(namespace):
    [listed] = re.findall(r"target_modules=\[(.*)\]", TEXT)
    layers = namespace["model"].transformer.attn_layers.layers
    found = {name.rpartition(".")[2] for name, child in layers.named_modules() if isinstance(child, torch.nn.Linear)}
    assert set(re.findall(r"\w+", listed)) == found
