"""`andromeda info`: the installation, and the backend that would run each operation."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from typing import Any

from andromeda.cli import cgroups, threads
from andromeda.cli.console import show

DESCRIPTION = """\
Show what is installed, how the extension was built, which devices there are, and for each operation
which backend would run and why the others would not."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit code."""
    facts = gather_info()
    show(json.dumps(facts, indent=2) if arguments.json else info_table(facts))
    return 0


def gather_info() -> dict[str, Any]:
    """The facts that `andromeda info --json` prints."""
    import torch

    from andromeda import __version__
    from andromeda.ops import _select

    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors", "triton")
    facts: dict[str, Any] = {
        "andromeda": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _installed(name) for name in packages},
        "torch_cuda": torch.version.cuda,
        "extension": _extension(),
        "cuda": _cuda_versions(),
        "devices": _devices(),
        "operations": {},
        "preferences": {},
    }
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        dtype = str(_select.usual_dtype(device)).removeprefix("torch.")
        try:
            report = _select.report(device)
        except RuntimeError as error:  # torch sees the device but cannot use it: another process may own it
            facts["cuda"]["error"] = str(error).partition("\n")[0]
            continue
        for operation, reasons in report.items():
            chosen = next((name for name, why in reasons.items() if not why), None)
            run = {"dtype": dtype, "runs": chosen, "reasons": reasons}
            facts["operations"].setdefault(operation, {})[device] = run
        for operator, found in _select.preferences(torch.device(device)).items():
            facts["preferences"][operator] = found._asdict()
    return facts


def _installed(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    if importlib.util.find_spec(name) is None:
        return None
    # From a distribution of another name: AMD's Triton is pytorch-triton-rocm.
    others = importlib.metadata.packages_distributions().get(name)
    return f"{importlib.metadata.version(others[0])} ({others[0]})" if others else None


def _extension() -> dict[str, Any]:
    from andromeda.ops import _select

    if _select.extension_error is not None:
        return {"loaded": False, "reason": _select.extension_error}
    return {
        "loaded": True,
        "build": _select.extension.build_info(),
        "cpu_isa": _select.extension.cpu_isa(),
        "cpu_isas": list(_select.extension.cpu_isas()),
    }


def _cuda_versions() -> dict[str, str | None]:
    """The CUDA version of the kernels, and the newest one that the driver runs, each None if absent. Uses no device."""
    from andromeda.ops import _select

    if _select.extension_error is not None:
        return {"runtime": None, "driver": None}
    versions = _select.extension.cuda_versions()
    return {"runtime": versions["runtime"], "driver": versions["driver"]}


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = {
        "device": "cpu",
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "affinity": threads.affinity(),
        "quota": cgroups.quota(),
    }
    devices = [cpu]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "multiprocessors": properties.multi_processor_count,
                }
            )
    return devices


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def info_table(facts: dict[str, Any]) -> str:
    """The facts as `andromeda info` prints them."""
    lines = [f"andromeda {facts['andromeda']}", ""]

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        width = max((len(name) for name, _ in rows), default=0)
        lines.append(title)
        for name, value in rows:
            lines.append(f"  {name:{width}}  {value}".rstrip())
        lines.append("")

    build = f" (built for CUDA {facts['torch_cuda']})" if facts["torch_cuda"] else " (built without CUDA)"
    versions = [("python", facts["python"]), ("platform", facts["platform"])]
    versions += [
        (name, (version or "not installed") + (build if name == "torch" else ""))
        for name, version in facts["packages"].items()
    ]
    section("Versions", versions)

    extension = facts["extension"]
    if extension["loaded"]:
        rows = [(name.replace("_", " "), _short(value)) for name, value in extension["build"].items()]
        usable = ", ".join(extension["cpu_isas"])
        rows.append(("runs on this CPU", f"{extension['cpu_isa']} (usable: {usable}; ANDROMEDA_CPU_ISA forces one)"))
        section("Extension", rows)
    else:
        section("Extension", [("not loaded", extension["reason"])])

    cuda = facts["cuda"]
    rows = [("kernels built with", cuda["runtime"]), ("torch built with", facts["torch_cuda"])]
    rows += [("driver runs", cuda["driver"])]
    rows += [("not usable", cuda["error"])] if "error" in cuda else []
    section("CUDA", [(name, _short(version)) for name, version in rows])

    rows = []
    for device in facts["devices"]:
        if device["device"] == "cpu":
            detail = _processors(device)
        else:
            detail = f"compute capability {device['capability']}, {device['memory_gib']} GiB"
        rows.append((device["device"], f"{device['name']}, {detail}"))
    if len(rows) == 1:
        rows.append(("cuda", "none visible"))
    section("Devices", rows)

    names = [name for runs in facts["operations"].values() for run in runs.values() for name in run["reasons"]]
    width = max(map(len, names), default=0)
    for operation, devices in facts["operations"].items():
        for device, run in devices.items():
            lines.append(f"{operation} on {device}, {run['dtype']}: {run['runs'] or 'nothing'} runs")
            for name, reasons in run["reasons"].items():
                mark = ">" if name == run["runs"] else " "
                lines.append(f"  {mark} {name:{width}}  {'; '.join(reasons) or 'available'}")
            lines.append("")
    for operator, found in facts["preferences"].items():
        work = f"{found['least_flops'] / 1e9:.0f} GFLOP"
        lines.append(f"{operator} from {work} on: {found['backend']} comes first ({found['reason']})")
    return "\n".join(lines).rstrip()


def _processors(cpu: dict[str, Any]) -> str:
    """How many threads torch uses, and how many the machine and its limits allow."""
    granted = "no quota" if cpu["quota"] is None else f"a quota of {cpu['quota']:g}"
    threads = f"{cpu['threads']} thread{'s' * (cpu['threads'] != 1)}"
    return f"{threads} on {cpu['cores']} processors (affinity: {cpu['affinity']}, {granted})"


def _short(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None or value == "" else str(value)
