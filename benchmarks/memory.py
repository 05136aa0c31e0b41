"""The peak memory of this process, on a GPU or without one."""

import ctypes
import gc
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _from_status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def return_freed_memory() -> None:
    """Hands what was freed back to the system, so that what is resident is what is used."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
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
