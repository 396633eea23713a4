"""Two processes that run the same cases together, once for all tests of a file."""

import datetime
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_two(cases, folder):
    """name -> the results of cases[name]() in both processes; that of a case which raises is its traceback."""
    mp.spawn(_work, (cases, str(folder)), nprocs=2)
    of_ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return {name: [results[name] for results in of_ranks] for name in cases}


def checked(results):
    """The results of a case in both processes, if it has not raised."""
    for result in results:
        assert not isinstance(result, str), result
    return results


def whole(tensor):
    """A tensor, or that of which the processes have parts."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _work(rank, cases, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    # A process that waits for one that has failed must not wait long.
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    results = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
