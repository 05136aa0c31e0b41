"""How a base layer stores W0: `nn.Linear` (out, in), GPT-2's `Conv1D` (in, out), bitsandbytes 4-bit and 8-bit."""

import math
import sys
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from plainlora.lora.errors import LoRAError

ROWS = 64  # of a weight, at a time, where a sum cannot be formed in place


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored transposed, (in, out)."""
    return isinstance(module, Conv1D)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is one of bitsandbytes' linear layers. Never imports bitsandbytes."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))


def features(module: nn.Module) -> tuple[int, int]:
    """`(d_in, d_out)` of a supported module."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def is_supported(module: nn.Module) -> bool:
    """Whether LoRA can wrap the module: a linear map, whatever its class.

    Some routers and grouped projections are subclasses of `nn.Linear` that return something else; a subclass is asked.
    """
    if type(module) in (nn.Linear, Conv1D) or is_quantized(module):
        return True
    return isinstance(module, (nn.Linear, Conv1D)) and _maps_linearly(module)


@torch.no_grad()
def _maps_linearly(module: nn.Module) -> bool:
    """Whether `(2, d_in)` becomes `(2, d_out)`; nothing is computed on the meta device."""
    d_in, d_out = features(module)
    weight = cast(torch.Tensor, module.weight)
    try:
        output = module(torch.zeros(2, d_in, dtype=weight.dtype, device=weight.device))
    except Exception:  # whatever a model's own code raises
        return False
    return isinstance(output, torch.Tensor) and output.shape == (2, d_out)


def is_fusable(module: nn.Module) -> bool:
    """Whether the input gradient of a frozen module is `dh W0`, with a W0 that `dense_weight` can give."""
    return type(module) in (nn.Linear, Conv1D) or _is_4bit(module)


def _is_4bit(module: nn.Module) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def dropped_dtype(module: nn.Module, x: torch.Tensor, adapter: torch.dtype) -> torch.dtype:
    """The dtype of `x` in `dropout(x)`, as PEFT has it: the adapter's, which PEFT's dense layers always cast to.

    Its bitsandbytes layers leave the cast to CUDA's autocast where that is on, and drop elements of `x` as it is. This
    is more than rounding: on CUDA a thread draws for 16 bytes of `x` at a time, so the mask depends on the dtype.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/bnb.py (`requires_conversion`)
    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/cuda/Dropout.cu (`get_vector_size`)

    Args:
        module: The base layer.
        x: `(..., d_in)`.
        adapter: The dtype of A.
    """
    return x.dtype if is_quantized(module) and torch.is_autocast_enabled("cuda") else adapter


@torch.no_grad()
def dense_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """W0 as `(d_out, d_in)`; a view where the weight is dense and of that dtype already."""
    weight = cast(torch.Tensor, module.weight)
    if _is_4bit(module):
        state = module.weight.quant_state  # type: ignore[union-attr]
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state).to(dtype)
    return (weight.T if is_conv1d(module) else weight).to(dtype)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum has finite terms only, and is one read without a mask."""
    precision = torch.promote_types(tensor.dtype, torch.float32)
    return math.isfinite(tensor.sum(dtype=precision)) or bool(torch.isfinite(tensor).all())


def _as_stored(
    module: nn.Module, lora_b: torch.Tensor, lora_a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W0 as it is stored, and the two factors whose product has its shape, in the precision of the sum."""
    weight = cast(torch.Tensor, module.weight).detach()
    left, right = (lora_a.T, lora_b.T) if is_conv1d(module) else (lora_b, lora_a)
    precision = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)
    return weight, left.detach().to(precision), right.detach().to(precision)


def _sums(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`weight + scaling * left right`, `ROWS` rows at a time: those of the weight, and their sum before rounding."""
    for rows, factor in zip(weight.split(ROWS), left.split(ROWS), strict=True):
        yield rows, torch.addmm(rows.to(factor.dtype), factor, right, alpha=scaling)


def check_addition(module: nn.Module, lora_b: torch.Tensor, lora_a: torch.Tensor, scaling: float) -> None:
    """Raises `LoRAError` where `add_product` cannot be had: a quantised weight, or a sum that overflows its dtype.

    No element of the product is larger than

        |scaling| max_i sum_k |B_ik| max_j |A_kj|

    and less than half a unit in the last place of the largest number of W0's dtype lifts no finite weight beyond that
    number. So W0 need not be read; only where the bound is above a quarter, as it is rounded too, is the sum formed.
    """
    if is_quantized(module):
        raise LoRAError(
            "cannot merge into quantised weights: rounding the sum back to 4 or 8 bits can erase the adapter "
            "(peft#2321); load the base in 16 bit, or call its dequantize() first"
        )
    weight, left, right = _as_stored(module, lora_b, lora_a)
    largest = torch.finfo(weight.dtype).max
    unit = largest * torch.finfo(weight.dtype).eps / 2
    bound = abs(scaling) * float((left.abs() @ right.abs().amax(1)).amax())
    if bound < unit / 4:
        return
    if not all(is_finite(total.to(weight.dtype)) for _, total in _sums(weight, left, right, scaling)):
        raise LoRAError(f"the merged weight is not finite in {weight.dtype}; merge in a wider dtype")


def add_product(module: nn.Module, lora_b: torch.Tensor, lora_a: torch.Tensor, scaling: float) -> None:
    """`W0 <- W0 + scaling * B A`, in place, rounded once to W0's dtype; nothing of W0's size is allocated.

    Args:
        module: A supported module that `check_addition` lets pass.
        lora_b: `(d_out, r)`, any floating dtype.
        lora_a: `(r, d_in)`.
        scaling: alpha / r (dimensionless).
    """
    weight, left, right = _as_stored(module, lora_b, lora_a)
    if weight.dtype == left.dtype:
        weight.addmm_(left, right, alpha=scaling)
        return
    for rows, total in _sums(weight, left, right, scaling):
        rows.copy_(total)
