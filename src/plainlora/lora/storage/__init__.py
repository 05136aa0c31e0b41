"""How a base layer stores W0: one file for each kind of storage.

To add one, write a subclass of `Storage` in a file of its own and add it to `STORAGES`; nothing else names it.
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
    """The storage of a module's weight; `None` if it is not a linear layer, or its storage is not supported."""
    return next((storage for storage in STORAGES if storage.matches(module)), None)


def storage_of(module: nn.Module) -> Storage:
    """The storage of a linear layer's weight.

    Raises:
        LoRAError: It is not supported.
    """
    storage = find_storage(module)
    if storage is None:
        weight = type(getattr(module, "weight", None)).__name__
        raise LoRAError(f"this LoRA does not support a {type(module).__name__} whose weight is a {weight}")
    return storage


def is_supported(module: nn.Module) -> bool:
    """Whether LoRA can wrap the module, that is, whether it computes a linear map.

    Some routers and grouped projections are subclasses of `nn.Linear` that compute something else, so a subclass is
    run on zeros to see the shape of its output.
    """
    storage = find_storage(module)
    return storage is not None and (storage.quantized or storage.is_fusable(module) or _maps_linearly(module, storage))


@torch.no_grad()
def _maps_linearly(module: nn.Module, storage: Storage) -> bool:
    """Whether the module maps `(2, d_in)` to `(2, d_out)`."""
    d_in, d_out = storage.features(module)
    weight = cast(torch.Tensor, module.weight)
    try:
        output = module(torch.zeros(2, d_in, dtype=weight.dtype, device=weight.device))
    except Exception:  # whatever a model's own code raises
        return False
    return isinstance(output, torch.Tensor) and output.shape == (2, d_out)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is a linear layer with a quantised weight."""
    storage = find_storage(module)
    return storage is not None and storage.quantized


def is_fusable(module: nn.Module) -> bool:
    """Whether the input gradient of a frozen module is `dh W0`, with the W0 of `dense_weight`."""
    storage = find_storage(module)
    return storage is not None and storage.is_fusable(module)


@torch.no_grad()
def dense_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """W0 as `(d_out, d_in)`; a view where the weight is dense and of that dtype already.

    Raises:
        LoRAError: See `storage_of`.
    """
    return storage_of(module).dense_weight(module, dtype)
