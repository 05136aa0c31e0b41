"""How much memory this process has used at most."""

import resource
import sys

import torch


def peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU, or, without one, that the process has held resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
