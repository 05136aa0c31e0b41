"""`nn.Linear`: W0 stored as `(d_out, d_in)`."""

from typing import cast

import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from plainlora.lora.storage.interface import Storage


def is_plain(weight: object) -> bool:
    """Whether a tensor stores its values directly: a subclass of `torch.Tensor` may store something else.

    FakeTensor (with which memory is counted) and DTensor (a shard) count as plain.
    """
    if type(weight) in (nn.Parameter, torch.Tensor) or isinstance(weight, FakeTensor):
        return True
    return distributed.is_available() and isinstance(weight, distributed.tensor.DTensor)


def inner_tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold a weight: itself, or the parts of a tensor subclass (int8 values and scales).

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_python_dispatch.py (`is_traceable_wrapper_subclass`)
    """
    if is_plain(weight) or not is_traceable_wrapper_subclass(weight):
        return [weight.detach()]
    names, _ = weight.__tensor_flatten__()
    return [getattr(weight, name) for name in names]


class Dense(Storage):
    """An `nn.Linear`, or a subclass of it, whose weight is an ordinary tensor."""

    def matches(self, module: nn.Module) -> bool:
        """See `Storage`."""
        return isinstance(module, nn.Linear) and is_plain(module.weight)

    def dense_weight(self, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """See `Storage`."""
        return cast(nn.Linear, module).weight.to(dtype)

    def is_fusable(self, module: nn.Module) -> bool:
        """A subclass may compute anything."""
        return type(module) is nn.Linear
