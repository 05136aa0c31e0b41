"""The interface of a storage: what LoRA must know about a base layer."""

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import nn

from plainlora.lora.errors import LoRAError


class Storage(ABC):
    """One way in which a linear layer stores its frozen W0, `(d_out, d_in)`.

    Attributes:
        transposed: Whether the weight is stored as `(d_in, d_out)`: `fan_in_fan_out` of a `LoraConfig`.
        quantized: Whether the weight is quantised, so that no delta can be added to it.
        packed: Whether the weight's dtype is only that of a container, as of 4 bits (`bnb_4bit_quant_storage`).
    """

    transposed = False
    quantized = False
    packed = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the module stores its weight this way. If a library is not imported, no module is of its classes."""

    def features(self, module: nn.Module) -> tuple[int, int]:
        """`(d_in, d_out)`."""
        return cast(nn.Linear, module).in_features, cast(nn.Linear, module).out_features

    @abstractmethod
    def dense_weight(self, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """W0 as `(d_out, d_in)`: a view where the weight is dense and of that dtype already."""

    def is_fusable(self, module: nn.Module) -> bool:
        """Whether the module computes `W0 x + b` with the W0 of `dense_weight`, so that `dx = dh W0`."""
        del module
        return True

    def dropped_dtype(self, x: torch.Tensor, adapter: torch.dtype) -> torch.dtype:
        """The dtype of `x` in `dropout(x)`, as in PEFT: the adapter's, unless PEFT leaves the cast to autocast.

        On CUDA the dropout mask depends on it: a thread draws for 16 bytes of `x` at a time.

        https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/cuda/Dropout.cu (`get_vector_size`)

        Args:
            x: `(..., d_in)`.
            adapter: The dtype of A.
        """
        del x
        return adapter

    def writable_weight(self, module: nn.Module) -> torch.Tensor:
        """The stored weight itself as `(d_out, d_in)`, to be changed in place.

        Raises:
            LoRAError: The weight is quantised.
        """
        if self.quantized:
            raise LoRAError(
                "cannot merge into quantised weights: rounding the sum back to 4 or 8 bits can erase the adapter "
                "(peft#2321); load the base in 16 bit, or call its dequantize() first"
            )
        weight = cast(torch.Tensor, module.weight).detach()
        return weight.T if self.transposed else weight
