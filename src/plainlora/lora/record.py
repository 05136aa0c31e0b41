"""What an injected model carries: its `AdapterState`, its LoRA layers and its `modules_to_save`."""

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
class AdapterState:
    """The adapter's config and what `unwrap` must restore, kept on the model as `model.plainlora`.

    Attributes:
        config: The resolved config: explicit target names, the classification head in `modules_to_save`.
        trainable: Names of the parameters that required gradients before `inject`, a tied one under each name.
        biases: The base's values of the biases that are trained (`bias` of the config), by parameter.
        new_weights: Frozen parameters that the base's checkpoint lacks; they are saved with the adapter.
        save_pretrained: The model's `save_pretrained`, if set on the instance; `None` if it is its class's.
    """

    config: LoraConfig
    trainable: set[str]
    biases: dict[nn.Parameter, torch.Tensor]
    new_weights: set[nn.Parameter]
    save_pretrained: Callable[..., Any] | None = None


def adapter_state(model: nn.Module) -> AdapterState:
    """What `inject` recorded on a model.

    Raises:
        LoRAError: The model carries no adapter of this package.
    """
    state = getattr(model, "plainlora", None)
    if state is None:
        raise LoRAError(
            f"this {type(model).__name__} carries no PlainLoRA adapter; call inject() or load_adapter() first"
        )
    return state


def _wrappers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, LoRALinear | ModuleToSave]]:
    """The modules that `inject` put in, with full names. Unlike `named_modules` this does not look inside them."""
    for key, child in module.named_children():
        if isinstance(child, (LoRALinear, ModuleToSave)):
            yield f"{prefix}{key}", child
        else:
            yield from _wrappers(child, f"{prefix}{key}.")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The LoRA layers with their full names, in the model's own order."""
    return ((name, module) for name, module in _wrappers(model) if isinstance(module, LoRALinear))


def saved_modules(model: nn.Module) -> Iterator[tuple[str, ModuleToSave]]:
    """The modules trained whole with their full names, in the model's own order."""
    return ((name, module) for name, module in _wrappers(model) if isinstance(module, ModuleToSave))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the module of this full name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
