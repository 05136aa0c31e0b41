"""`fuse(model)`: an injected model, or PEFT's, computes the fused form, in place."""

import logging
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from plainlora.fast.activations import swiglu
from plainlora.fast.lora import fused_forward
from plainlora.lora import storage
from plainlora.lora.errors import some
from plainlora.lora.layer import LoRALinear
from plainlora.lora.record import ModelT

GATED = (LlamaMLP, MistralMLP, Qwen2MLP)  # down(act(gate(x)) * up(x))

logger = logging.getLogger(__name__)


def _layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoraLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, (LoRALinear, LoraLayer)))


def _forward_own(layer: LoRALinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not layer.enabled or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    p = _probability(layer.lora_dropout)
    return fused_forward(layer.base_layer, x, layer.lora_A.weight, layer.lora_B.weight, layer.scaling, p)


def _forward_peft(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What PEFT's `lora.Linear.forward` computes for its active adapters; whatever else it can do, it does itself.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    p = max([0.0, *[_probability(layer.lora_dropout[name]) for name in names]])  # a list, for torch.compile
    plain = not (args or kwargs or layer.disable_adapters or layer.merged or not names)
    if not plain or any(name in layer.lora_variant for name in names) or (p > 0 and len(names) > 1):
        return type(layer).forward(layer, x, *args, **kwargs)
    lora_a, lora_b = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    scaling = layer.scaling[names[0]]
    if len(names) > 1:  # one map of the sum of the ranks
        lora_a = torch.cat([layer.lora_A[name].weight for name in names])
        lora_b = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], dim=1)
        scaling = 1.0
    return fused_forward(layer.base_layer, x, lora_a, lora_b, scaling, p)


def _gelu(_: NewGELUActivation, x: torch.Tensor) -> torch.Tensor:
    """`0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` in one kernel that keeps x alone, not in eight.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/activations.py
    """
    return functional.gelu(x, approximate="tanh")


def _gated(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/llama/modeling_llama.py."""
    return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _rest_of(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., torch.Tensor]]]:
    """What else has a leaner form, and that form."""
    for module in model.modules():
        if isinstance(module, NewGELUActivation):
            yield module, _gelu
        elif type(module) in GATED and isinstance(module.act_fn, (SiLUActivation, nn.SiLU)):
            yield module, _gated


def _probability(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _is_covered(layer: LoRALinear | LoraLayer) -> bool:
    base = layer.base_layer
    if not isinstance(base, nn.Module) or not storage.is_fusable(base) or base.weight.requires_grad:
        return False
    return isinstance(layer, LoRALinear) or not any(getattr(layer, "lora_bias", {}).values())


def fuse(model: ModelT) -> ModelT:
    """Gives every LoRA layer the fused form, in place; GPT-2's GELU and SwiGLU a leaner one; `unfuse` takes it back.

    With an existing TRL + PEFT script this is one line after the model or its trainer is made. What is not covered
    keeps the form it has and is named in the log: 8-bit layers, embeddings, convolutions; DoRA and other variants go
    PEFT's own way.

    Args:
        model: From `plainlora.inject`, `plainlora.load_adapter`, `peft.get_peft_model` or `PeftModel.from_pretrained`.

    Returns:
        The same model.
    """
    left = []
    for name, layer in _layers(model):
        if _is_covered(layer):
            form = _forward_own if isinstance(layer, LoRALinear) else _forward_peft
            layer.forward = MethodType(form, layer)  # type: ignore[method-assign, union-attr]
        else:
            left.append(name)
    for module, rest in _rest_of(model):
        module.forward = MethodType(rest, module)
    if left:
        logger.warning("%d layers are not fused: %s", len(left), some(left))
    return model


def unfuse(model: ModelT) -> ModelT:
    """Every module's own form again: the inverse of `fuse`."""
    for module in [layer for _, layer in _layers(model)] + [module for module, _ in _rest_of(model)]:
        module.__dict__.pop("forward", None)
    return model
