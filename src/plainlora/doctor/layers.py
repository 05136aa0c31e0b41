"""Finds the layers that LoRA would adapt, on the meta device."""

from collections import Counter

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from plainlora.backends import BACKENDS, Backend, BackendName, adapted_layers, attach_adapter, count_parameters
from plainlora.doctor.finding import Examination
from plainlora.errors import UserError
from plainlora.lora.errors import some
from plainlora.lora.record import lora_layers


def examine_layers(
    skeleton: PreTrainedModel | None,
    lora: LoraConfig,
    backend: BackendName,
    examination: Examination,
    merges: bool = False,
) -> list[str]:
    """Checks that every name of the adapter's config matches, and counts what is trained.

    Args:
        skeleton: The base on the meta device. The adapter is attached to it.
        lora: The adapter's config.
        backend: The name of the back end that trains it.
        examination: Gets the findings.
        merges: Whether the adapter will be merged.

    Returns:
        The distinct names of the adapted layers; none if there is an error.
    """
    if skeleton is None:
        message = (
            "the architecture could not be built without its weights, so its layers are checked when it is loaded"
        )
        examination.add("note", "adapter", "layers", message)
        return []
    with torch.device("meta"):
        adapted = examination.ask("adapter", "layers", attach_adapter, skeleton, lora, BACKENDS[backend])
    if adapted is None:
        return []
    _examine_scale(adapted, lora, examination)
    if lora.target_modules == "all-linear" and (experts := _stacked_weights(adapted)):
        message = f"all-linear leaves {some(experts)} frozen, as PEFT does: they are parameters, not linear layers"
        examination.add("warning", "adapter", "experts", message)
    names = Counter(name.removesuffix(".base_layer").rpartition(".")[2] for name in adapted_layers(adapted))
    trainable, total = count_parameters(adapted)
    counts = ", ".join(f"{count} {name}" for name, count in names.items())
    message = f"LoRA on {sum(names.values())} layers ({counts}): {trainable:,} of {total:,} parameters are trained"
    examination.add(
        "ok", "adapter", "layers", message, layers=dict(names), trainable_params=trainable, total_params=total
    )
    if merges and backend in ("peft", "peft_fused"):
        examination.ask("adapter", "merge", _merge, BACKENDS[backend], adapted)
    return list(names)


def _merge(backend: Backend, adapted: nn.Module) -> None:
    """Merges on the `meta` device.

    Raises:
        UserError: The trained adapter could not be merged.
    """
    try:
        backend.merge(adapted)
    except UserError as error:
        raise UserError(f"{error}; set merge to false") from error


def _stacked_weights(model: nn.Module) -> list[str]:
    """Names of parameters that stack several weights, as the experts of a mixture do; they are not linear layers."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d)
    ]


def _examine_scale(adapted: nn.Module, lora: LoraConfig, examination: Examination) -> None:
    """Warns of a rank above the width of most layers (of the hand-written form), and of a negative scale."""
    layers = [layer for _, layer in lora_layers(adapted)]
    full = sum(layer.r > min(layer.in_features, layer.out_features) for layer in layers)
    if 2 * full > len(layers):
        message = f"in {full} of {len(layers)} layers r exceeds the smaller of in and out features; lower lora_r"
        examination.add("warning", "adapter", "rank", message)
    if lora.lora_alpha < 0:
        examination.add("warning", "adapter", "alpha", f"lora_alpha {lora.lora_alpha} is below 0; was that meant?")
