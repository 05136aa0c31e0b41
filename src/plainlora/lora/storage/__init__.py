"""How a base layer stores W0: one file a kind.

A new kind is a class in a file of its own, and its place in `STORAGES`. Nothing else in the package names a kind.
"""

from typing import cast

import torch
from torch import nn

from plainlora.lora.errors import LoRAError
from plainlora.lora.storage.bitsandbytes import Bits4, Bits8
from plainlora.lora.storage.conv1d import Transposed
from plainlora.lora.storage.dense import Dense
from plainlora.lora.storage.interface import Storage
from plainlora.lora.storage.torchao import Int8

STORAGES: tuple[Storage, ...] = (Bits4(), Bits8(), Int8(), Transposed(), Dense())  # the first that matches


def find_storage(module: nn.Module) -> Storage | None:
    """How a module stores its weight; `None` if it is no linear layer, or stores it in a way that none here knows."""
    return next((storage for storage in STORAGES if storage.matches(module)), None)


def storage_of(module: nn.Module) -> Storage:
    """How a linear layer stores its weight.

    Raises:
        LoRAError: In a way that none here knows.
    """
    storage = find_storage(module)
    if storage is None:
        weight = type(getattr(module, "weight", None)).__name__
        raise LoRAError(f"LoRA here adapts no {type(module).__name__} whose weight is a {weight}")
    return storage


def is_supported(module: nn.Module) -> bool:
    """Whether LoRA can wrap the module: a linear map, whatever its class.

    Some routers and grouped projections are subclasses of `nn.Linear` that return something else; a subclass is asked.
    """
    storage = find_storage(module)
    return storage is not None and (storage.quantized or storage.is_fusable(module) or _maps_linearly(module, storage))


@torch.no_grad()
def _maps_linearly(module: nn.Module, storage: Storage) -> bool:
    """Whether `(2, d_in)` becomes `(2, d_out)`; nothing is computed on the meta device."""
    d_in, d_out = storage.features(module)
    weight = cast(torch.Tensor, module.weight)
    try:
        output = module(torch.zeros(2, d_in, dtype=weight.dtype, device=weight.device))
    except Exception:  # whatever a model's own code raises
        return False
    return isinstance(output, torch.Tensor) and output.shape == (2, d_out)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is a linear layer of few bits."""
    storage = find_storage(module)
    return storage is not None and storage.quantized


def is_fusable(module: nn.Module) -> bool:
    """Whether the input gradient of a frozen module is `dh W0`, with a W0 that `dense_weight` gives."""
    storage = find_storage(module)
    return storage is not None and storage.is_fusable(module)


@torch.no_grad()
def dense_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """W0 as `(d_out, d_in)`; a view where the weight is dense and of that dtype already.

    Raises:
        LoRAError: See `storage_of`.
    """
    return storage_of(module).dense_weight(module, dtype)
