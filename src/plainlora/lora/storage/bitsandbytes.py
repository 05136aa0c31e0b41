"""bitsandbytes' 4-bit (NF4, FP4) and 8-bit layers. bitsandbytes is not imported here."""

import sys
from typing import cast

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from plainlora.lora.storage.interface import Storage


class _Bitsandbytes(Storage):
    quantized = True
    class_name: str

    def matches(self, module: nn.Module) -> bool:
        """See `Storage`."""
        bitsandbytes = sys.modules.get("bitsandbytes")
        return bitsandbytes is not None and isinstance(module, getattr(bitsandbytes.nn, self.class_name))

    def dropped_dtype(self, x: torch.Tensor, adapter: torch.dtype) -> torch.dtype:
        """Under CUDA's autocast PEFT does not cast `x` before the dropout.

        https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/bnb.py (`requires_conversion`)
        """
        return x.dtype if torch.is_autocast_enabled("cuda") else adapter


class Bits4(_Bitsandbytes):
    """`Linear4bit`, whose weight is packed: two values a byte."""

    class_name = "Linear4bit"
    packed = True

    def dense_weight(self, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """See `Storage`."""
        weight = cast(torch.Tensor, module.weight)
        # FSDP2 replaces the weight by one that has lost it (pytorch#136929); the module keeps it.
        state = getattr(weight, "quant_state", None) or module.quant_state
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state).to(dtype)


class Bits8(_Bitsandbytes):
    """`Linear8bitLt`, which multiplies the input's outliers apart and so has its own backward pass."""

    class_name = "Linear8bitLt"

    def dense_weight(self, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """See `Storage`. On a CPU PEFT's `dequantize_module_weight` also replaces the weight by one without scales.

        https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/integrations.py
        """
        return dequantize_bnb_weight(cast(nn.Parameter, module.weight), state=module.state).to(dtype)

    def is_fusable(self, module: nn.Module) -> bool:
        """See `Storage`."""
        del module
        return False
