"""Whether a weight is an ordinary tensor, and the tensors inside a tensor subclass."""

import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


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
