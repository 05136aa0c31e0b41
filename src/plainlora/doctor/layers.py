"""Which layers LoRA would sit on, found on the base's architecture without its weights."""

from collections import Counter

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from plainlora.backends import BACKENDS, attach_adapter, count_parameters
from plainlora.doctor.finding import Examination
from plainlora.lora.errors import some
from plainlora.lora.record import lora_layers


def examine_layers(skeleton: PreTrainedModel | None, lora: LoraConfig, examination: Examination) -> list[str]:
    """Whether every name of the adapter's config matches, and what is trained.

    Args:
        skeleton: The base without weights. It carries the adapter afterwards.
        lora: The adapter.
        examination: Told what was found.

    Returns:
        The names of the layers that are adapted, each once; none if they cannot be.
    """
    if skeleton is None:
        said = (
            "the architecture could not be laid out without its weights, so its layers are checked when it is loaded"
        )
        examination.add("note", "adapter", "layers", said)
        return []
    with torch.device("meta"):
        adapted = examination.ask("adapter", "layers", attach_adapter, skeleton, lora, BACKENDS["reference"])
    if adapted is None:
        return []
    _examine_scale(adapted, lora, examination)
    if lora.target_modules == "all-linear" and (experts := _stacked_weights(adapted)):
        said = f"all-linear leaves {some(experts)} frozen, as PEFT does: they are parameters, not linear layers"
        examination.add("warning", "adapter", "experts", said)
    names = Counter(name.rpartition(".")[2] for name, _ in lora_layers(adapted))
    trainable, total = count_parameters(adapted)
    counts = ", ".join(f"{count} {name}" for name, count in names.items())
    said = f"LoRA on {sum(names.values())} layers ({counts}): {trainable:,} of {total:,} parameters are trained"
    examination.add(
        "ok", "adapter", "layers", said, layers=dict(names), trainable_params=trainable, total_params=total
    )
    return list(names)


def _stacked_weights(model: nn.Module) -> list[str]:
    """Names of the weights of several maps in one parameter: the experts of a mixture, of which no layer is linear."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d)
    ]


def _examine_scale(adapted: nn.Module, lora: LoraConfig, examination: Examination) -> None:
    """Warns of a rank that most layers cannot have, and of a scale below 0."""
    layers = [layer for _, layer in lora_layers(adapted)]
    full = sum(layer.r > min(layer.in_features, layer.out_features) for layer in layers)
    if 2 * full > len(layers):
        said = f"in {full} of {len(layers)} layers r is above the smaller width, which no rank can be; lower lora_r"
        examination.add("warning", "adapter", "rank", said)
    if lora.lora_alpha < 0:
        examination.add("warning", "adapter", "alpha", f"lora_alpha {lora.lora_alpha} is below 0; was that meant?")
