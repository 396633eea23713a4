"""What `andromeda info` says."""

import importlib.metadata
import json
import subprocess
import sys

from andromeda.cli import main


def test_info_as_a_process():
    """Also: it neither needs nor loads transformers and datasets."""
    program = (
        "import sys, andromeda.cli as cli; code = cli.main(['info', '--json']);"
        "assert not {'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["packages"]["transformers"] == importlib.metadata.version("transformers")
    assert set(facts["operations"]) == {"attention", "qk_norm_rotary", "token_shift_norm"}
    for runs in facts["operations"].values():
        assert runs["cpu"]["runs"] in ("cpu", "reference")
        assert runs["cpu"]["reasons"]["cuda"] != []


def test_info_table(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "Versions",
        "Extension",
        "Devices",
        "torch",
        "attention on cpu, float32:",
        "qk_norm_rotary on cpu, float32:",
        "token_shift_norm on cpu, float32:",
        "reference",
    ):
        assert part in shown


def test_info_without_the_extension(capsys, monkeypatch):
    from andromeda.ops import _select

    monkeypatch.setattr(_select, "extension", None)
    monkeypatch.setattr(_select, "extension_error", "not built, for the test")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "not built, for the test" in shown and "attention on cpu, float32: reference runs" in shown
