"""The interface of an engine, and the simplest one: one process, or DistributedDataParallel.

Whatever the engine, a checkpoint has the same files: the adapter whole, in PEFT's format, and its optimizer's state
whole, in PyTorch's format. So a run resumes on another engine or another number of processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer


class Engine:
    """One process, or DistributedDataParallel: every process has every weight and the optimizer's whole state.

    Args:
        trainer: The trainer that uses it.
    """

    name = "DDP"
    shards_base = False  # so that processes can compute with the base only together

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.groups: list[list[nn.Parameter]] = []  # the trained weights, in the optimizer's groups

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        """Remembers the trained weights, before an engine replaces them in the optimizer by its own."""
        if not self.groups:
            self.groups = [list(group["params"]) for group in optimizer.param_groups]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained weights, in the order of the optimizer's state."""
        return [parameter for group in self.groups for parameter in group]

    def before_wrapping(self, model: nn.Module) -> None:
        """Called before Accelerate wraps the model for training."""

    def after_wrapping(self, model: nn.Module) -> None:
        """Called after Accelerate has wrapped the model for training."""

    def reshard(self, model: nn.Module) -> None:
        """Makes each process hold its part of the base alone, as between two steps."""

    @contextmanager
    def whole(self, changed: bool = False) -> Iterator[None]:
        """A context in which the trained weights are whole in every process. To be entered by all.

        Args:
            changed: Whether they are changed within the block, in all processes alike.
        """
        yield

    def average_gradients(self) -> None:
        """Averages the gradients of the trained weights over processes, if the engine has not done so."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's whole state, as `torch.optim.Optimizer.state_dict` gives it. To be called by all."""
        optimizer: Any = self.trainer.optimizer
        return dict(optimizer.state_dict())

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Loads what `optimizer_state` returned."""
        optimizer: Any = self.trainer.optimizer
        optimizer.load_state_dict(state)


def shard_of(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this process holds: of a DTensor (FSDP2), of a ZeRO-3 parameter, or all of it."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    partition: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    return parameter if partition is None else partition
