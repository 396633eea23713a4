"""Makes the tests of transformers importable as the package `transformers_tests`.

The environment variable TRANSFORMERS_TESTS names the folder `tests` of an unpacked source package. That package leaves
out the folders below `tests`; the names that its files import from there are in `STAND_INS`.
"""

import multiprocessing
import os
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.utils

NAME, VARIABLE = "transformers_tests", "TRANSFORMERS_TESTS"


def start_rank_processes(function: Callable[..., None], args: tuple[Any, ...] = (), nprocs: int = 1) -> None:
    """Call function(rank, *args) in `nprocs` processes. They begin as copies of one that has imported all it takes."""
    multiprocessing.set_forkserver_preload(["model_tests"])
    torch.multiprocessing.start_processes(function, args, nprocs, start_method="forkserver")


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: calls function(rank, *args) in `world_size` processes that form a gloo group."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            start_rank_processes(_in_group, (world_size, port, function, args), world_size)

        return run

    return decorate


def _in_group(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": world_size,
        "RANK": rank,
        "LOCAL_RANK": rank,
    }
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()


# module -> names that the source package leaves out. The two mixins are empty: no test comes from them.
STAND_INS: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "distributed_testing_utils": {
        "run_distributed": run_distributed,
        "_start_rank_processes": start_rank_processes,
        "_get_distributed_backend": lambda: "gloo",
        "_get_distributed_device_type": lambda: "cpu",
        "_get_rank_device": lambda rank: torch.device("cpu"),
        "_set_rank_device": lambda rank: None,
    },
    # Arguments of every config of transformers, with values that are not the defaults.
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "architectures": ["AndromedaForCausalLM"],
            "chunk_size_feed_forward": 5,
            "dtype": "float16",
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "output_attentions": True,
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
            "tie_word_embeddings": True,
        }
    },
}


def register() -> None:
    """Afterwards `import transformers_tests.test_modeling_common` works."""
    if NAME in sys.modules:
        return
    # One file asks for the sources of transformers beside it, and does not use them.
    transformers.utils.direct_transformers_import = lambda path: transformers
    folder = Path(os.environ[VARIABLE])
    _add(NAME, {"__path__": [str(folder)]})
    for path, names in STAND_INS.items():
        if not (folder / path.replace(".", "/")).with_suffix(".py").exists():
            parent, _, _ = path.rpartition(".")
            if parent:
                _add(f"{NAME}.{parent}", {"__path__": []})
            _add(f"{NAME}.{path}", names)


def _add(name: str, content: dict[str, Any]) -> None:
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
