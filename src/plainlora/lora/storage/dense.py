"""`nn.Linear`: W0 stored as `(d_out, d_in)`."""

from typing import cast

import torch
from torch import nn

from plainlora.lora.storage.interface import Storage
from plainlora.lora.storage.tensors import is_plain


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
