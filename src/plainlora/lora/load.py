"""A saved adapter onto a base: inject what its config says, then fill it."""

import os

from plainlora.lora.config import find_unsupported
from plainlora.lora.errors import LoRAError, some
from plainlora.lora.inject import inject, unwrap
from plainlora.lora.interchange import load_adapter_weights, read_config, saved_head_weights
from plainlora.lora.layer import LoRALinear
from plainlora.lora.record import ModelT


def load_adapter(
    model: ModelT,
    directory: str | os.PathLike[str],
    trainable: bool = False,
    layer_class: type[LoRALinear] = LoRALinear,
) -> ModelT:
    """Injects the adapter that a directory describes and fills it with the saved weights: PEFT's or this package's.

    Weights of the head that were saved with the adapter, because the base's checkpoint lacks them, replace the base's
    own and stay when the adapter is taken out.

    Args:
        model: The base model, untouched so far.
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.
        trainable: Whether to go on training; otherwise every parameter is frozen and dropout is off.
        layer_class: As for `inject`.

    Returns:
        The same model.

    Raises:
        LoRAError: The config says what this package does not implement; or see `read_config`, `saved_head_weights`,
            `inject` and `load_adapter_weights`. Then the model is as it was before.
    """
    config = read_config(directory)
    if unsupported := find_unsupported(config):
        raise LoRAError(
            f"{directory} was trained with {some(list(unsupported.values()))}, which this LoRA does not implement; "
            "load it with PEFT (PeftModel.from_pretrained)"
        )
    inject(
        model,
        config,
        strict=False,
        new_weights=saved_head_weights(model, directory),
        low_cpu_mem_usage=True,  # what was saved takes the place of A and B, so none is drawn
        layer_class=layer_class,
    )
    try:
        load_adapter_weights(model, directory)
    except LoRAError:
        unwrap(model)
        raise
    if not trainable:
        model.requires_grad_(False).eval()
    return model
