"""Whether the accelerate config asks for FSDP or DeepSpeed, by the variables that `accelerate launch` sets.

https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/launch.py
"""

import os


def asks_for_fsdp() -> bool:
    """Whether the accelerate config asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def asks_for_deepspeed() -> bool:
    """Whether the accelerate config asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
