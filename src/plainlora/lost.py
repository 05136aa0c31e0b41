"""What a process says when another one of the same run is gone."""

import os
import re

from plainlora.interruption import what_is_lost


def is_of_another_process(error: BaseException) -> bool:
    """Whether an error says that another process does not answer. Gloo's is a RuntimeError that names its file."""
    import torch.distributed as dist  # noqa: PLC0415  this module is imported by programs that end without torch

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def describe_lost(error: BaseException) -> str:
    """Who says it, who is gone, and what the communication said, in one clause.

    Args:
        error: One of another process.
    """
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said = re.sub(r"^\[\S*gloo\S*\] ", "", first).partition(". ")[0][:120]
    rank, count = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
    return f"process {rank} of {count}: {what_is_lost() or 'another process is gone'} ({said})"
