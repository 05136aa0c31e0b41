"""Runs a function in two processes that train together, as `accelerate launch` would on a CPU."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIMIT = 120.0  # seconds, after which they wait for each other


def _begin(rank: int, folder: Path, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # the store does without
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", rank=rank, store=store, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(function(rank, *given)))


def in_two_processes(folder: Path, function: Callable[..., Any], *given: Any) -> list[Any]:
    """What `function(rank, *given)` returns in each process, as JSON has words for it.

    Args:
        folder: An empty one.
        function: Of a module; it is not told that a test runs.
        given: Its other arguments.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    processes = [
        context.Process(target=_begin, args=(rank, folder, function, given), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
