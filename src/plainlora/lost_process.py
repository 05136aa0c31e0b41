"""Recognises errors that mean that another process of the same run is gone, and describes them in one line."""

import os
import re

from plainlora.interruption import describe_lost_ranks


def is_of_another_process(error: BaseException) -> bool:
    """Whether an error means that another process does not answer. Gloo raises a RuntimeError that names its file."""
    import torch.distributed as dist  # noqa: PLC0415  some commands import this module and never need torch

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def describe_lost(error: BaseException) -> str:
    """The process that noticed, the processes that are gone, and the error's own words, in one clause.

    Args:
        error: An error for which `is_of_another_process` is true.
    """
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said = re.sub(r"^\[\S*gloo\S*\] ", "", first).partition(". ")[0][:120]
    rank, count = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
    return f"process {rank} of {count}: {describe_lost_ranks() or 'another process is gone'} ({said})"
