"""The worker's side of the race: it waits for its turn, times it, and knows how much memory it has used."""

import ctypes
import gc
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from plainlora.bench.profiling import sort_operations

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Over(Exception):
    """The race is over."""


def _from_status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def return_freed_memory() -> None:
    """Hands what was freed back to the system, so that what is resident is what is used."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """Bytes in use and at most in use since `start`: allocated on a GPU; resident (`VmHWM`) without one."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before = 0

    def start(self) -> None:
        """From here on."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            return_freed_memory()
            CLEAR.write_text("5")  # sets VmHWM back to what is resident now, see proc(5)
            self.before = _from_status("VmRSS")

    def peak(self) -> int:
        """The most since `start`, what was there before included."""
        return torch.cuda.max_memory_allocated() if self.cuda else _from_status("VmHWM")

    def reserved(self) -> dict[str, int]:
        """What PyTorch's allocator has asked a GPU for at most since `start`; nothing without one."""
        return {"peak reserved": torch.cuda.max_memory_reserved()} if self.cuda else {}


class Turns:
    """One worker's end of the pipe.

    Args:
        device: `cpu` or `cuda`.
        pipe: To the process that gives the turns.
        scratch: A folder for whatever must be written; it goes when the race is over.

    Attributes:
        facts: What was counted and does not vary; sent at the end.
    """

    def __init__(self, device: str, pipe: Connection, scratch: str) -> None:
        self.device, self.scratch = device, scratch
        self.meter = Meter(device)
        self.facts: dict[str, Any] = {}
        self._pipe, self._started = pipe, 0.0
        self._profile: torch.profiler.profile | None = None
        self._memory: dict[str, int] = {}

    def ready(self) -> None:
        """The weights are there; what memory is used from here on is the arm's own."""
        self.meter.start()
        self._pipe.send("ready")

    def begin(self) -> None:
        """Waits for the turn and starts the clock.

        Raises:
            Over: There are no more turns.
        """
        word = self._pipe.recv()
        if word not in ("go", "profile"):
            raise Over
        if word == "profile":
            self._profile = torch.profiler.profile()
            self._profile.start()
        self._synchronize()
        self._started = time.perf_counter()

    def end(self) -> None:
        """Stops the clock; a turn that was profiled leaves the time of each kind of operation."""
        self._synchronize()
        seconds = time.perf_counter() - self._started
        if self._profile is None:
            peak = self.meter.peak()
            self._memory = {"peak": peak, "peak above weights": peak - self.meter.before} | self.meter.reserved()
        else:
            self._profile.stop()
            self.facts["profile"] = sort_operations(self._profile, self.device, seconds)
            self._profile = None
        self._pipe.send(seconds)

    def close(self) -> None:
        """Sends what was counted, and the memory at the end of the last turn that was not profiled."""
        self._pipe.send(self.facts | self._memory)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
