"""torchao's int8: an `nn.Linear` whose weight is a tensor subclass. torchao is not imported here."""

import sys

import torch
from torch import nn

from plainlora.lora.storage.interface import Storage


class Int8(Storage):
    """Weights of `Int8WeightOnlyConfig`: int8 with one scale a row. Activations are not quantised."""

    quantized = True

    def matches(self, module: nn.Module) -> bool:
        """See `Storage`."""
        torchao = sys.modules.get("torchao.quantization")
        if torchao is None or type(module) is not nn.Linear or not isinstance(module.weight, torchao.Int8Tensor):
            return False
        return module.weight.act_quant_kwargs is None and module.weight.act_pre_scale is None

    def dense_weight(self, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """See `Storage`."""
        return module.weight.dequantize().to(dtype)  # type: ignore[operator]
