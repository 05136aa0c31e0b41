"""One arm of one case, in a process of its own."""

import os
import traceback
import warnings
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from plainlora.bench.turns import Over, Turns


@dataclass(frozen=True)
class Job:
    """What a worker does: `take_part(arm, options, turns)` of a module of this package."""

    module: str
    arm: str
    options: dict[str, Any]
    device: str
    scratch: str


@dataclass(frozen=True)
class Failure:
    """Why a worker stopped: the error in a line, and where it was raised."""

    reason: str
    where: str


def settle_allocator() -> None:
    """Brings the C library's allocator into the state that it has in a process that trains.

    glibc raises the size from which it asks the system for memory, and gives it back, to that of the largest block
    freed so far, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). A fresh process would pay for new pages at every step
    that an older one has long had.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8).fill_(0)


def work(job: Job, pipe: Connection) -> None:
    """Takes part until there are no more turns; what a library prints goes nowhere, an error goes to the parent.

    All workers import at the same time, and load one after the other: each when the parent says so.
    """
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settle_allocator()
    torch.manual_seed(0)
    turns = Turns(job.device, pipe, job.scratch)
    try:
        take_part = import_module(f"plainlora.bench.{job.module}").take_part
        pipe.recv()
        take_part(job.arm, job.options, turns)
    except Over:
        turns.close()
    except EOFError:
        pass  # another arm failed, and the parent has left
    except Exception as error:  # whatever a library raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        pipe.send(Failure(reason, traceback.format_exc()))
