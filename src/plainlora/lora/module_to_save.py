"""One of PEFT's `modules_to_save`: a module that is trained whole, beside the LoRA layers."""

import copy
from typing import Any, cast

import torch
from torch import nn


def _copy_of(module: nn.Module) -> nn.Module:
    """A deep copy. Under DeepSpeed ZeRO-3 a weight is empty until it is gathered, as PEFT does for its copy too.

    https://github.com/huggingface/peft/blob/v0.21.0/src/peft/utils/other.py (`ModulesToSaveWrapper`)
    """
    parameters = list(module.parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return copy.deepcopy(module)
    import deepspeed  # noqa: PLC0415  an extra

    with deepspeed.zero.GatheredParameters(parameters):
        return copy.deepcopy(module)


class ModuleToSave(nn.Module):
    """A frozen module and a trained copy of it, which is called in its place."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.trained_module = _copy_of(original).requires_grad_(True)
        self.enabled = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The trained copy's output; the original's while disabled."""
        module = self.trained_module if self.enabled else self.original_module
        return module(*args, **kwargs)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in use: fused loss heads read `lm_head.weight` instead of calling the module."""
        return cast(torch.Tensor, (self.trained_module if self.enabled else self.original_module).weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias in use, if there is one."""
        return getattr(self.trained_module if self.enabled else self.original_module, "bias", None)
