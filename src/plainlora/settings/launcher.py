"""Whether the accelerate config asks for FSDP or DeepSpeed, by the variables that `accelerate launch` sets.

https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/launch.py
"""

import os

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
