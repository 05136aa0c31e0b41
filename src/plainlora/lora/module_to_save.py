"""One of PEFT's `modules_to_save`: a module that is trained whole, beside the LoRA layers."""

import copy
from typing import Any, cast

import torch
from torch import nn


class ModuleToSave(nn.Module):
    """A frozen module and a trained copy of it, which is called in its place."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.trained_module = copy.deepcopy(original).requires_grad_(True)
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
