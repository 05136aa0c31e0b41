"""What an injected model carries: the record of the injection, its LoRA layers, its wholly trained modules."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from torch import nn

from plainlora.lora.errors import LoRAError
from plainlora.lora.layer import LoRALinear
from plainlora.lora.module_to_save import ModuleToSave

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass
class Injection:
    """What `inject` did to a model, kept on the model as `model.plainlora`.

    Attributes:
        config: The config as resolved: explicit target names, the classification head in `modules_to_save`.
        trainable: Names of the parameters that required gradients before, a tied one's under each of its names.
        biases: The base's own values of the biases that are trained (`bias` of the config), by parameter.
        new_weights: Frozen parameters that the base's checkpoint lacks, so that they are saved with the adapter.
        save_pretrained: The model's own, where it had one of its own; `None` where its class's is in force.
    """

    config: LoraConfig
    trainable: set[str]
    biases: dict[nn.Parameter, torch.Tensor]
    new_weights: set[nn.Parameter]
    save_pretrained: Callable[..., Any] | None = None


def injection(model: nn.Module) -> Injection:
    """The record of `inject`.

    Raises:
        LoRAError: The model carries no adapter of this package.
    """
    record = getattr(model, "plainlora", None)
    if record is None:
        raise LoRAError(
            f"this {type(model).__name__} carries no PlainLoRA adapter; call inject() or load_adapter() first"
        )
    return record


def _wrappers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, LoRALinear | ModuleToSave]]:
    """What `inject` put in, with full names; unlike `named_modules` it does not look inside them."""
    for key, child in module.named_children():
        if isinstance(child, (LoRALinear, ModuleToSave)):
            yield f"{prefix}{key}", child
        else:
            yield from _wrappers(child, f"{prefix}{key}.")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The LoRA layers with their full names, in the model's own order."""
    return ((name, module) for name, module in _wrappers(model) if isinstance(module, LoRALinear))


def saved_modules(model: nn.Module) -> Iterator[tuple[str, ModuleToSave]]:
    """The wholly trained modules with their full names, in the model's own order."""
    return ((name, module) for name, module in _wrappers(model) if isinstance(module, ModuleToSave))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one that has this full name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
