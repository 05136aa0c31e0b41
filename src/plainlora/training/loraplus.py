"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): a higher learning rate for B than for A, by PEFT's own factory."""

from typing import Any, cast

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer

from plainlora.errors import UserError


class WithLoRAPlus(Trainer):
    """Trainer whose optimizer has the rate `learning_rate * loraplus_lr_ratio` for B and for every vector.

    Attributes:
        loraplus_lr_ratio: The rate of B divided by the rate of A; `None` for one rate.
    """

    loraplus_lr_ratio: float | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As Trainer's, with one parameter group for A and others for B.

        Raises:
            UserError: The optimizer makes its own groups.
        """
        if self.loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, self.model))
        if options.keys() & {"params", "model", "optimizer_dict"}:
            raise UserError(f"loraplus_lr_ratio: optim {self.args.optim} makes its own groups; choose another optim")
        self.optimizer = create_loraplus_optimizer(
            cast(PeftModel, self.model),  # any module: it looks at names
            kind,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer
