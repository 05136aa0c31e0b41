"""What `accelerate launch` asks for, by the environment variables that it sets from an accelerate config.

https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/launch.py
"""

import os


def asks_for_fsdp() -> bool:
    """Whether the accelerate config asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def asks_for_deepspeed() -> bool:
    """Whether the accelerate config asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
