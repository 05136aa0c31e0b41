"""One variant of one case, in a process of its own."""

import os
import traceback
import warnings
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from benchmarks.timer import Finished, Timer


@dataclass(frozen=True)
class Job:
    """What a worker does: `run_variant(variant, options, timer)` of a module of this package."""

    module: str
    variant: str
    options: dict[str, Any]
    device: str
    scratch: str


@dataclass(frozen=True)
class Failure:
    """Why a worker stopped: the error in a line, and where it was raised."""

    reason: str
    where: str


def warm_up_allocator() -> None:
    """Brings the C library's allocator into the state that it has in a process that trains.

    glibc raises the size from which it asks the system for memory, and gives it back, to that of the largest block
    freed so far, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). A fresh process would pay for new pages at every step
    that an older one has long had.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8).fill_(0)


def run_job(job: Job, pipe: Connection) -> None:
    """Runs a variant until no more is asked for; what a library prints goes nowhere, an error goes to the parent.

    All workers import at the same time, and load one after the other: each when the parent asks.
    """
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warm_up_allocator()
    torch.manual_seed(0)
    timer = Timer(job.device, pipe, job.scratch)
    try:
        run_variant = import_module(f"benchmarks.{job.module}").run_variant
        pipe.recv()
        run_variant(job.variant, job.options, timer)
    except Finished:
        timer.close()
    except EOFError:
        pass  # another variant failed, and the parent has left
    except Exception as error:  # whatever a library raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        pipe.send(Failure(reason, traceback.format_exc()))
