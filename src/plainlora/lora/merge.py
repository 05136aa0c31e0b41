"""Merging: W0 <- W0 + (alpha / r) B A, after which no LoRA module is left."""

import torch
from torch import nn
from transformers import PreTrainedModel

from plainlora.lora.errors import LoRAError
from plainlora.lora.inject import restore_attributes
from plainlora.lora.numerics import is_finite
from plainlora.lora.record import ModelT, adapter_state, lora_layers, replace_module, saved_modules
from plainlora.lora.storage import storage_of


def _untie_if_diverged(model: nn.Module) -> None:
    """Sets `tie_word_embeddings` to false if the head or the embeddings were trained whole.

    Otherwise `save_pretrained` would drop one of the two weights and `from_pretrained` would copy the other over it
    (transformers#45127).
    """
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        return
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False


@torch.no_grad()
def merge(model: ModelT) -> ModelT:
    """Adds every delta to its base weight, in place, and takes the LoRA modules out.

    Base weights are not checked: one that is not finite stays so.

    Args:
        model: A model from `inject` or `load_adapter`, its base unquantised.

    Returns:
        The same model in its base architecture. Its `save_pretrained` writes a plain checkpoint.

    Raises:
        LoRAError: The base is quantised, the adapter or the sum is not finite, or there is no adapter.
            The model is then unchanged.
    """
    state = adapter_state(model)
    layers = list(lora_layers(model))
    for name, layer in layers:  # all are checked before the first weight changes
        if not all(map(is_finite, layer.adapter_tensors().values())):
            raise LoRAError(f"the adapter of {name!r} holds values that are not finite; nothing was merged")
        layer.check_delta(storage_of(layer.base_layer).writable_weight(layer.base_layer))
    for name, layer in layers:
        layer.add_delta(storage_of(layer.base_layer).writable_weight(layer.base_layer))
        replace_module(model, name, layer.base_layer)
    for name, module in list(saved_modules(model)):
        replace_module(model, name, module.trained_module)
    restore_attributes(model, state)
    _untie_if_diverged(model)
    return model
