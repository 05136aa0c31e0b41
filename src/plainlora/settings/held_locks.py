"""Locks of PyTorch's compiled extensions, of which DeepSpeed loads one on a CPU."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

LONG = 30.0  # seconds that a lock has been held


def warn_of_held_locks() -> None:
    """Warns of a lock for which this process may wait.

    A process that is killed while it compiles or loads an extension leaves the lock, and all later ones wait for it
    without a word: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/file_baton.py
    """
    from torch.utils.cpp_extension import get_default_build_root  # noqa: PLC0415  imports setuptools

    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        with suppress(FileNotFoundError):  # it was given back meanwhile
            seconds = time.time() - lock.stat().st_mtime
            if seconds >= LONG:
                message = (
                    f"DeepSpeed may wait for {lock}, which a process took {seconds / 60:.0f} min ago; if none "
                    "compiles there, that process was killed: delete the file"
                )
                print(f"warning: {message}", file=sys.stderr, flush=True)
