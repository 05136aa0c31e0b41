"""A saved adapter onto a base: inject what its config says, then fill it."""

import os

from plainlora.lora.errors import LoRAError
from plainlora.lora.inject import inject, unwrap
from plainlora.lora.interchange import load_adapter_weights, read_config
from plainlora.lora.record import ModelT


def load_adapter(model: ModelT, directory: str | os.PathLike[str], trainable: bool = False) -> ModelT:
    """Injects the adapter that a directory describes and fills it with the saved weights: PEFT's or this package's.

    Args:
        model: The base model, untouched so far.
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.
        trainable: Whether to go on training; otherwise every parameter is frozen and dropout is off.

    Returns:
        The same model.

    Raises:
        LoRAError: See `read_config`, `inject` and `load_adapter_weights`. Then the model is as it was before.
    """
    inject(model, read_config(directory), strict=False)
    try:
        load_adapter_weights(model, directory)
    except LoRAError:
        unwrap(model)
        raise
    if not trainable:
        model.requires_grad_(False).eval()
    return model
