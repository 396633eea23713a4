"""`andromeda info`."""

import importlib.metadata
import importlib.util
import json
import os
import pwd
import subprocess
import sys

import pytest
import torch

from andromeda.cli import info
from andromeda.cli.main import main


def test_info_as_a_process():
    """The command does not load transformers and datasets."""
    program = (
        "import sys; from andromeda.cli.main import main; code = main(['info', '--json']);"
        "assert not {'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["packages"]["transformers"] == importlib.metadata.version("transformers")
    assert {"attention", "qk_norm_rotary", "token_shift_norm"} <= set(facts["operations"])
    for runs in facts["operations"].values():
        assert runs["cpu"]["runs"] in ("cpu", "reference")
        assert runs["cpu"]["reasons"]["cuda"] != [] and runs["cpu"]["reasons"]["triton"] != []


def test_versions_of_cuda(capsys, monkeypatch):
    from andromeda.ops import _select

    if _select.extension.build_info()["cuda_architectures"]:
        assert main(["info", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["extension"]["build"]["ptxas"] and facts["cuda"]["runtime"]
    for driver in ("12.4", None):
        monkeypatch.setattr(
            _select.extension, "cuda_versions", lambda driver=driver: {"runtime": "13.0", "driver": driver}
        )
        assert main(["info"]) == 0
        lines = {line.strip() for line in capsys.readouterr().out.splitlines()}
        assert {"kernels built with  13.0", f"driver runs         {driver or 'none'}"} <= lines


def test_a_triton_of_another_name(monkeypatch):
    versions = {"pytorch-triton-rocm": "3.5.1"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"triton": list(versions)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "triton" else None)
    assert info._installed("triton") == "3.5.1 (pytorch-triton-rocm)"
    assert info._installed("datasets") is None


def test_info_of_a_device_that_cannot_be_used(capsys, monkeypatch):
    """In exclusive mode torch counts the device but refuses its first tensor."""
    from andromeda.ops import _select

    report = _select.report

    def refused(device):
        if device == "cuda":
            raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with ...")
        return report(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(_select, "report", refused)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "not usable          CUDA error: CUDA-capable device(s) is/are busy or unavailable\n" in shown
    assert "attention on cpu, float32: cpu runs" in shown


def test_info_table(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "Versions",
        "Extension",
        "CUDA",
        "Devices",
        "torch",
        "attention on cpu, float32:",
        "qk_norm_rotary on cpu, float32:",
        "token_shift_norm on cpu, float32:",
        "reference",
    ):
        assert part in shown


@pytest.mark.parametrize(
    "quota, threads, text",
    [
        (None, 2, "2 threads on 8 processors (affinity: 4, no quota)"),
        (0.5, 1, "1 thread on 8 processors (affinity: 4, a quota of 0.5)"),
    ],
)
def test_info_of_processors(capsys, monkeypatch, quota, threads, text):
    monkeypatch.setattr("andromeda.cli.cgroups.quota", lambda: quota)
    monkeypatch.setattr("andromeda.cli.threads.affinity", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert main(["info"]) == 0
    assert text in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    cpu = json.loads(capsys.readouterr().out)["devices"][0]
    assert (cpu["threads"], cpu["cores"], cpu["affinity"], cpu["quota"]) == (threads, 8, 4, quota)


def test_info_of_a_user_without_a_home(capsys, monkeypatch):
    def no_account(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", no_account)
    monkeypatch.delenv("HOME", raising=False)
    assert main(["info"]) == 0
    assert "Devices" in capsys.readouterr().out


def test_info_without_the_extension(capsys, monkeypatch):
    from andromeda.ops import _select

    monkeypatch.setattr(_select, "extension", None)
    monkeypatch.setattr(_select, "extension_error", "not built, for the test")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "not built, for the test" in shown and "attention on cpu, float32: reference runs" in shown
