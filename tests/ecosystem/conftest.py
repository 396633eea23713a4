"""What the tests with packages of the extra `ecosystem` share: a tiny Andromeda and a Llama of the same size.

Without the packages the folder is skipped as a whole, with one reason; where CI is "true" that is an error.
"""

import re
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def missing_packages():
    """The packages of the extra that are not installed."""
    extra = re.search(r"^ecosystem = \[$(.*?)^\]", PROJECT.read_text(), re.MULTILINE | re.DOTALL)
    installed = {re.sub("[-_.]+", "-", found.name).lower() for found in metadata.distributions()}
    return [name for name in re.findall(r'"([\w-]+)', extra[1]) if name.lower() not in installed]


MISSING = missing_packages()

# The files import those packages at their tops. test_installed.py says what is missing.
collect_ignore_glob = ["test_[!i]*.py"] if MISSING else []

MODELS = ("llama", "andromeda")


@pytest.fixture
def missing():
    """The packages of the extra that are not installed."""
    return MISSING


@pytest.fixture(scope="session")
def tokenizer():
    from tiny_models import new_tokenizer

    return new_tokenizer()


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token per byte: 0 is padding, 1 the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="session")
def subjects(tokenizer, tmp_path_factory):
    """name -> `tiny_models.Subject`."""
    from tiny_models import new_subject

    return {name: new_subject(name, tokenizer, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(params=MODELS)
def subject(request, subjects):
    """Each model in turn."""
    return subjects[request.param]


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory):
    """Caches and downloads of these tests neither use nor leave anything outside of a temporary folder."""
    import datasets
    from huggingface_hub import constants
    from transformers import dynamic_module_utils

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HOME", str(home))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        yield home


# ---- the score


scores = {name: Counter() for name in MODELS}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name = parameters.get("subject", parameters.get("family"))
    if name in scores and (report.when == "call" or report.failed):
        refused = dict(item.user_properties).get("outcome") == "refused"
        scores[name]["fails" if report.failed else "refused" if refused else "works"] += 1
    return report


def pytest_terminal_summary(terminalreporter):
    if any(scores.values()):
        terminalreporter.section("features of transformers and its ecosystem")
        for name, score in scores.items():
            line = ", ".join(f"{score[outcome]} {outcome}" for outcome in ("works", "refused", "fails"))
            terminalreporter.line(f"{name:>10}: {line}")
