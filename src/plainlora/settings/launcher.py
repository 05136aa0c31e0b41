"""Whether the accelerate config asks for FSDP or DeepSpeed, by the variables that `accelerate launch` sets.

https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/launch.py
"""

import os
import sys
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root
from transformers.integrations import is_deepspeed_zero3_enabled


def asks_for_fsdp() -> bool:
    """Whether the accelerate config asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def asks_for_deepspeed() -> bool:
    """Whether the accelerate config asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def sharding_engine() -> str | None:
    """The engine that the accelerate config asks for, if it shards the base's weights: `FSDP2` or `ZeRO-3`."""
    return "FSDP2" if asks_for_fsdp() else "ZeRO-3" if is_deepspeed_zero3_enabled() else None


def warn_of_held_locks(seconds: float = 30.0) -> None:
    """Warns of a lock of PyTorch's extensions, of which DeepSpeed loads one on a CPU.

    A process that is killed while it compiles or loads an extension leaves the lock, and all later ones wait for it
    without a word: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/file_baton.py

    Args:
        seconds: How long a lock must have been held.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if 60 * minutes >= seconds and os.environ.get("LOCAL_RANK", "0") == "0":
            message = (
                f"DeepSpeed may wait for {lock}, which a process took {minutes:.0f} min ago; if none compiles there, "
                "that process was killed: delete the file"
            )
            print(f"warning: {message}", file=sys.stderr, flush=True)
