"""Trainer overrides that make saving, resuming and reducing the same on every engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer

from plainlora.errors import UserError
from plainlora.settings.launcher import asks_for_deepspeed, asks_for_fsdp
from plainlora.settings.parsing import forget_deepspeed
from plainlora.training.engines.engine import Engine
from plainlora.training.engines.fsdp2 import FSDP2, fsdp_on_cpu
from plainlora.training.engines.zero import ZeRO, adapter_loaded_by


class EngineTrainer(Trainer):
    """Trainer whose adapter is saved and resumed in the same files on every engine.

    Attributes:
        engine: The engine that trains.
    """

    engine: Engine
    load_adapter: Callable[[str], None]  # loads a checkpoint's adapter into the model

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's.

        Raises:
            UserError: FSDP or DeepSpeed was asked for, and Accelerate does not use it.
        """
        with fsdp_on_cpu(self.args):
            super().create_accelerator_and_postprocess()
        if (asks_for_fsdp() or self.args.fsdp) and not self.is_fsdp_enabled:
            raise UserError("FSDP was asked for, and Accelerate does not use it here: it needs two processes or more")
        if asks_for_deepspeed() and not self.is_deepspeed_enabled:
            raise UserError("DeepSpeed was asked for, and Accelerate does not use it here: set use_cpu to false")
        kind = ZeRO if self.is_deepspeed_enabled else FSDP2 if self.is_fsdp_enabled else Engine
        self.engine = kind(self)

    def end(self) -> None:
        """As Trainer's; models that are loaded later are whole, not sharded by DeepSpeed."""
        super().end()
        forget_deepspeed()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, without empty groups, such as one of weights without decay: DeepSpeed drops those."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.engine.note(optimizer)
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As Trainer's, which wraps the model, and under DeepSpeed and FSDP loads the checkpoint."""
        model = cast(nn.Module, self.model)
        self.engine.before_wrapping(model)
        with adapter_loaded_by(self.load_whole):
            found = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.engine.after_wrapping(model)
        return found

    def load_whole(self, checkpoint: str) -> None:
        """Loads a checkpoint's adapter into the trained weights, which an engine may have sharded."""
        with self.engine.whole(changed=True):
            self.load_adapter(checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's; after the last batch of a step the gradients are those of all processes."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.engine.average_gradients()
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """On every engine saves what Trainer saves in one process: the main process writes the adapter."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.engine.reshard(cast(nn.Module, self.model))  # reading the state would reshard the main process alone
            if self.args.should_save:
                self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """On every engine writes the files that Trainer writes in one process."""
        state = self.engine.optimizer_state()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """On every engine reads the files that Trainer writes in one process."""
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
            self.engine.load_optimizer_state(state)
            scheduler: Any = self.lr_scheduler
            scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
