"""What each step of a trainer trained on, and the loss that came out."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback


class StepRecord(TrainerCallback):
    """Keeps the loss of each step, and how many labels were predicted; both are read after the clock has stopped.

    Args:
        trainer: Whose steps; its `StepTimer` comes first, and stops the clock.
        facts: Where `losses` (nats per label) and `tokens` are kept; the first token of a row is never predicted.
    """

    def __init__(self, trainer: Trainer, facts: dict[str, Any]) -> None:
        self.losses: list[float] = facts.setdefault("losses", [])
        self.tokens: list[int] = facts.setdefault("tokens", [])
        self._step = trainer.training_step
        trainer.training_step = self._training_step  # type: ignore[method-assign]
        trainer.add_callback(self)

    def _training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        labels = inputs["labels"]
        loss = self._step(model, inputs, *args, **kwargs)
        self._last = loss, labels
        return loss

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The clock has stopped."""
        loss, labels = self._last
        self.losses.append(loss.item())
        predicted = labels[:, 1:] if labels.dim() > 1 else labels  # of a language model, or a class a row
        self.tokens.append(int((predicted != -100).sum()))
