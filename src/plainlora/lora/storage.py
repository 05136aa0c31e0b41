"""How a base layer stores W0: `nn.Linear` (out, in), GPT-2's `Conv1D` (in, out), bitsandbytes 4-bit and 8-bit."""

import sys
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from plainlora.lora.errors import LoRAError


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored transposed, (in, out)."""
    return isinstance(module, Conv1D)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is one of bitsandbytes' linear layers. Never imports bitsandbytes."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))


def is_supported(module: nn.Module) -> bool:
    """Whether LoRA can wrap the module."""
    return isinstance(module, (nn.Linear, Conv1D))  # bitsandbytes' layers are subclasses of nn.Linear


def features(module: nn.Module) -> tuple[int, int]:
    """`(d_in, d_out)` of a supported module."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def is_fusable(module: nn.Module) -> bool:
    """Whether the input gradient of a frozen module is `dh W0`, with a W0 that `dense_weight` can give."""
    return type(module) in (nn.Linear, Conv1D) or _is_4bit(module)


def _is_4bit(module: nn.Module) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


@torch.no_grad()
def dense_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """W0 as `(d_out, d_in)`; a view where the weight is dense and of that dtype already."""
    weight = cast(torch.Tensor, module.weight)
    if _is_4bit(module):
        state = module.weight.quant_state  # type: ignore[union-attr]
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state).to(dtype)
    return (weight.T if is_conv1d(module) else weight).to(dtype)


@torch.no_grad()
def merged_weight(module: nn.Module, delta: torch.Tensor) -> torch.Tensor:
    """W0 + delta as the module stores it, rounded once to W0's dtype.

    Args:
        module: A supported, unquantised module; left as it is.
        delta: `(d_out, d_in)`, any floating dtype.

    Raises:
        LoRAError: The weight is quantised, or the sum overflows its dtype.
    """
    if is_quantized(module):
        raise LoRAError(
            "cannot merge into quantised weights: rounding the sum back to 4 or 8 bits can erase the adapter "
            "(peft#2321); load the base in 16 bit, or call its dequantize() first"
        )
    weight = cast(torch.Tensor, module.weight)
    merged = (weight + (delta.T if is_conv1d(module) else delta)).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise LoRAError(f"the merged weight is not finite in {merged.dtype}; merge in a wider dtype")
    return merged
