"""Times one variant's iterations, each when the parent process asks for it, and records the peak memory."""

import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.memory import PeakMemory
from benchmarks.profiling import sort_operations


class Finished(Exception):
    """The parent asks for no further iteration."""


class Timer:
    """A worker's end of the pipe to the parent.

    An iteration is what is timed at once: an optimizer step, an epoch, a few passes through a layer.

    Args:
        device: `cpu` or `cuda`.
        pipe: To the parent.
        scratch: A folder for whatever must be written; removed at the end of the case.

    Attributes:
        facts: What was counted and does not vary; sent at the end.
        memory: The peak memory since `ready`.
    """

    def __init__(self, device: str, pipe: Connection, scratch: str) -> None:
        self.device, self.scratch = device, scratch
        self.memory = PeakMemory(device)
        self.facts: dict[str, Any] = {}
        self._pipe, self._started = pipe, 0.0
        self._profile: torch.profiler.profile | None = None
        self._peaks: dict[str, int] = {}

    def ready(self) -> None:
        """The weights are loaded; memory above them is counted from here on."""
        self.memory.start()
        self._pipe.send("ready")

    def begin(self) -> None:
        """Waits until the parent asks for an iteration, and starts the clock.

        Raises:
            Finished: It asks for no more.
        """
        asked = self._pipe.recv()
        if asked not in ("time", "profile"):
            raise Finished
        if asked == "profile":
            self._profile = torch.profiler.profile()
            self._profile.start()
        self.synchronize()
        self._started = time.perf_counter()

    def end(self) -> None:
        """Stops the clock; an iteration that was profiled leaves the time of each kind of operation."""
        self.synchronize()
        seconds = time.perf_counter() - self._started
        if self._profile is None:
            peak = self.memory.peak()
            self._peaks = {"peak": peak, "peak above weights": peak - self.memory.before} | self.memory.reserved()
        else:
            self._profile.stop()
            self.facts["profile"] = sort_operations(self._profile, self.device, seconds)
            self._profile = None
        self._pipe.send(seconds)

    def answer(self, seconds: float) -> None:
        """Answers with seconds that were computed: for a variant that is no run, and has no memory and no profile."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
        self._pipe.send(seconds)

    def close(self) -> None:
        """Sends what was counted, and the memory at the end of the last iteration that was not profiled."""
        self._pipe.send(self.facts | self._peaks)

    def synchronize(self) -> None:
        """Waits for a GPU to finish what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
