"""Loads a saved adapter onto a base: injects LoRA layers by its config, then loads their weights."""

import os

from plainlora.lora.config import as_loaded, find_unsupported
from plainlora.lora.errors import LoRAError, UnsupportedError, some
from plainlora.lora.inject import inject, unwrap
from plainlora.lora.interchange import load_adapter_weights, read_config, saved_head_weights
from plainlora.lora.layer import LoRALinear
from plainlora.lora.record import ModelT


def load_adapter(
    model: ModelT,
    directory: str | os.PathLike[str],
    trainable: bool = False,
    layer_class: type[LoRALinear] | None = None,
) -> ModelT:
    """Loads an adapter that PEFT or this package saved onto its base model, in place.

    Head weights that were saved with the adapter, because the base's checkpoint lacks them, replace the base's own and
    stay when the adapter is taken out.

    Args:
        model: The base model, without an adapter.
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.
        trainable: Whether the adapter is to be trained further; otherwise every parameter is frozen and dropout off.
        layer_class: As for `inject`.

    Returns:
        The same model.

    Raises:
        UnsupportedError: Only PEFT can load the adapter. The model is then unchanged.
        LoRAError: See `read_config`, `saved_head_weights`, `inject` and `load_adapter_weights`. The model is then
            unchanged.
    """
    config = as_loaded(read_config(directory))
    if unsupported := find_unsupported(config):
        raise UnsupportedError(
            f"{directory} was trained with {some(list(unsupported.values()))}, which this LoRA does not implement; "
            "load it with PEFT (PeftModel.from_pretrained)"
        )
    inject(
        model,
        config,
        strict=False,
        new_weights=saved_head_weights(model, directory),
        low_cpu_mem_usage=True,  # A and B are loaded, not initialised
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
