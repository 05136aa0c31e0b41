"""GPT-2's `Conv1D`: W0 transposed, `(d_in, d_out)`."""

from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from plainlora.lora.storage.interface import Storage
from plainlora.lora.storage.tensors import is_plain


class Transposed(Storage):
    """Transformers' `Conv1D`, or a subclass of it."""

    transposed = True

    def matches(self, module: nn.Module) -> bool:
        """See `Storage`."""
        return isinstance(module, Conv1D) and is_plain(module.weight)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """See `Storage`."""
        return cast(Conv1D, module).nx, cast(Conv1D, module).nf

    def dense_weight(self, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """See `Storage`."""
        return cast(Conv1D, module).weight.T.to(dtype)

    def is_fusable(self, module: nn.Module) -> bool:
        """A subclass may compute anything."""
        return type(module) is Conv1D
