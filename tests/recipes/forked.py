"""Runs the programs of `recipes/` in processes that are forked from one in which everything is imported.

Importing takes 8 s and a short run 1 s, and a test that kills runs needs dozens of them. Importing this module imports
what the programs import; Python's own fork server does so once and forks a child for each run.
"""

import faulthandler
import gc
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parent.parent.parent
IN_FOLDER = ("os.remove", "os.rmdir")  # whose last value is the handle of the folder that the path is in, or -1
CHANGES = ("open", "os.mkdir", "os.rename", "os.chmod", "shutil.rmtree", *IN_FOLDER)
WRITING = os.O_WRONLY | os.O_RDWR
LIMIT = 300  # seconds

for _program in ("sft", "classify"):
    runpy.run_path(str(ROOT / "recipes" / f"{_program}.py"), run_name="imported")
gc.freeze()  # a fork then copies no page of it to count references


@dataclass(frozen=True)
class Order:
    """A run.

    Attributes:
        command: The program and its flags.
        output: The run's folder.
        log: The file that takes what it prints.
        trace: The file that takes a line for each change of a file in `output`, written before the change is made.
        strike_at: The number of the change, from 1, before which a signal comes; 0 if none.
        delay: Seconds by which it comes later.
        signal: Which.
        largest_file: Bytes; the kernel refuses to write a larger file (EFBIG).
    """

    command: tuple[str, ...]
    output: Path
    log: Path
    trace: Path
    strike_at: int = 0
    delay: float = 0.0
    signal: int = signal.SIGKILL
    largest_file: int | None = None


def _watch_changes(order: Order) -> None:
    """Python tells of most changes beforehand (https://docs.python.org/3/library/audit_events.html)."""
    count, process = 0, os.getpid()
    trace = os.open(order.trace, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or (event == "open" and not values[2] & WRITING):
            return
        path = str(values[0])
        if event in IN_FOLDER and values[-1] >= 0:
            path = f"{os.readlink(f'/proc/self/fd/{values[-1]}')}/{path}"
        if not path.startswith(str(order.output)):
            return
        count += 1
        os.write(trace, f"{event} {path}\n".encode())
        if count == order.strike_at:
            if order.delay:
                threading.Timer(order.delay, os.kill, (process, order.signal)).start()
            else:
                os.kill(process, order.signal)

    sys.addaudithook(hook)


def obey(order: Order) -> None:
    """Runs a program as `python PROGRAM FLAGS` would, and ends the process."""
    log = os.open(order.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable()
    tqdm.set_lock(threading.RLock())  # its own holds a semaphore, which a killed process leaves behind
    os.chdir(ROOT)
    if order.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.largest_file, resource.RLIM_INFINITY))
    _watch_changes(order)
    sys.argv = list(order.command)
    code: Any = 0
    try:
        runpy.run_path(order.command[0], run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(order: Order) -> ForkServerProcess:
    """Starts a run; its `pid` can be sent signals, its `exitcode` is negative if one ended it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=obey, args=(order,), daemon=True)
    process.start()
    return process


def finish(order: Order) -> int:
    """Runs to the end, whichever it is; returns the exit code, negative if a signal ended the process."""
    process = start(order)
    process.join(LIMIT)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGABRT)  # which prints where it hangs
        process.join()
        raise AssertionError(order.log.read_text(encoding="utf-8"))
    return process.exitcode
