"""Whether the accelerate config asks for FSDP or DeepSpeed, by the variables that `accelerate launch` sets.

https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/launch.py
"""

import os

from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled


def asks_for_fsdp() -> bool:
    """Whether the accelerate config asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def asks_for_deepspeed() -> bool:
    """Whether the accelerate config asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def sharding_engine(training: TrainingArguments | None = None) -> str | None:
    """The engine that is asked for, if it shards the base's weights: `FSDP2` or `ZeRO-3`.

    Args:
        training: The run's settings, which may ask for FSDP too.
    """
    if asks_for_fsdp() or (training is not None and training.fsdp):
        return "FSDP2"
    return "ZeRO-3" if is_deepspeed_zero3_enabled() else None
