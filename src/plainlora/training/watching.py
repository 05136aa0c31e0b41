"""Trainer that stops as soon as training goes wrong, and on a signal, with what was saved before in place.

A loss that became NaN has been logged as 0 in other projects.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from plainlora.errors import UserError
from plainlora.interruption import Stopped, StopRequest, stop_at_once
from plainlora.lost_process import describe_lost, is_of_another_process
from plainlora.run.checkpoints import newest_checkpoint
from plainlora.training.engines.trainer import EngineTrainer
from plainlora.training.rows_seen import ROWS, KeepsRowsOnHost, RowsSeen, describe_rows, rows_on_host
from plainlora.training.weight_checks import FirstGradients, FrozenWeights

OF_A_PART = ("train_loss", "train_samples_per_second", "train_steps_per_second")  # Trainer's names


class _AfterStep(TrainerCallback):
    """Calls a watched trainer's `after_step` after every optimizer step."""

    def __init__(self, trainer: "Watched") -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.after_step(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.stopping and control.should_training_stop and state.epoch % 1:
            # In the middle of an epoch. At its end the resumed run would not evaluate it again.
            control.should_save = control.should_evaluate = control.should_log = False


class Watched(EngineTrainer):
    """Trainer that stops with an error as soon as training goes wrong, and after a checkpoint on a signal.

    Reading a number from a GPU makes the host wait for it. So the losses of a step, its gradient norm and the signals
    are read together, with one transfer for each optimizer step, before the optimizer uses the gradients. DeepSpeed's
    has used them already, in `backward` (Accelerate's `DeepSpeedEngineWrapper`): training then stops after that step,
    and nothing of it is saved.

    Attributes:
        adapted: The model without the trainer's wrappers.
        seen: Digest of the rows that were trained on.
        stopping: The number of the signal for which all processes end training; 0 if there is none.
    """

    adapted: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen, self.stopping = RowsSeen(), 0
        self._request = StopRequest()
        self._batches: list[dict[str, np.ndarray]] = []  # since the last optimizer step
        self._batch_losses: list[torch.Tensor] = []  # of these batches
        self._frozen: FrozenWeights | None = None
        self._gradients: FirstGradients | None = None  # of the first step
        self._steps = 0  # of this process
        self.add_callback(self.seen)
        self.add_callback(_AfterStep(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains.

        Raises:
            UserError: A check failed, or another process is gone.
            Stopped: SIGTERM or Ctrl-C was received; a checkpoint of the current step was saved.
        """
        self._frozen, self._gradients, self._steps = None, FirstGradients(self.adapted), 0
        self._batches, self._batch_losses = [], []
        with self._request.listening():  # still, when the launcher ends this process because another one is gone
            try:
                outcome = self._train(*args, **kwargs)
            except Stopped as stopped:
                stopped.advice = self._advice()
                raise
        if self._steps < self.state.global_step:  # resumed: these figures are of this part of the run alone
            for name in OF_A_PART:
                outcome.metrics.pop(name, None)
        if self._request.number and not self.stopping:  # a signal after the last step
            stop_at_once(self._request.number)
        if self.stopping:
            step, output = self.state.global_step, self.args.output_dir
            what = f"stopped after step {step} of {self.state.max_steps}; {output}/checkpoint-{step} is saved"
            ended = Stopped(self.stopping, what if self.is_world_process_zero() else "")
            ended.advice = "resume with the same command and --resume_from_checkpoint true"
            raise ended
        return outcome

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's `train`; the loss of another process is reported in one line."""
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if self.accelerator.num_processes == 1 or not is_of_another_process(error):
                raise
            raise UserError(f"{describe_lost(error)}, so training stopped; {self._advice()}") from error

    def _init_training_state(
        self, max_steps: int, steps_an_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> Any:
        """As Trainer's, which fails at the next checkpoint if the one that is resumed knows fewer callbacks.

        Says which checkpoint that is; if it has no step left, `resume_path` has said so.

        https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py (`_save_checkpoint`)
        """
        found = super()._init_training_state(max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial)
        step = self.state.global_step
        if 0 < step < max_steps:
            self.accelerator.print(f"resuming from {resume_from_checkpoint}, after step {step} of {max_steps}")
        known = cast(dict[str, Any], self.state.stateful_callbacks)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                known.setdefault(type(callback).__name__, callback.state())
        return found

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. A run that was stopped keeps its newest checkpoint, and loads no other.

        With `save_total_limit: 1` Trainer keeps the best one alone.
        """
        if not self.stopping:
            return super()._finalize_training(*args, **kwargs)
        before = self.args.save_total_limit, self.args.load_best_model_at_end
        self.args.save_total_limit, self.args.load_best_model_at_end = None, False
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = before

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """As Trainer's, which with `save_strategy: best` saves only then; a run that is stopped saves in any case."""
        return super()._determine_best_metric(*args, **kwargs) or bool(self.stopping)

    def _advice(self) -> str:
        """How to continue from the newest checkpoint, if there is one, in one clause."""
        folder = str(self.args.output_dir)
        if kept := newest_checkpoint(folder):
            return f"{kept} is kept; resume with the same command and --resume_from_checkpoint true"
        return f"{folder} holds no checkpoint yet; give the same command again"

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As Trainer's, with `KeepsRowsOnHost`.

        Not with `dispatch_batches`, where one process collates for all: each would get the rows of all.
        """
        if self.accelerator.dispatch_batches:
            return super().get_train_dataloader()
        collator = cast(Callable[[list[Any]], Any], self.data_collator)
        self.data_collator = KeepsRowsOnHost(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trains on one batch. Its loss is checked before the optimizer's step, in `_get_grad_norm`."""
        if self._frozen is None:  # not earlier, because the engine has to shard the weights first
            self.engine.reshard(self.adapted)
            self._frozen = FrozenWeights(self.adapted)
        rows = inputs.pop(ROWS, None) or rows_on_host(inputs)
        self.seen.add(rows["input_ids"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append(rows)
        self._batch_losses.append(loss)
        return loss

    def _of_all_processes(self, *values: torch.Tensor | float) -> list[list[float]]:
        """The values of every process, `(processes, values)`, with one transfer from the device."""
        device = self.args.device
        mine = [
            value.to(device, torch.float32)
            if isinstance(value, torch.Tensor)
            # Not torch.tensor(value), which copies from the host and makes it wait; torch.full does not.
            else torch.full((), value, dtype=torch.float32, device=device)
            for value in values
        ]
        here = torch.stack(mine)[None]  # (1, values)
        everywhere = here if self.accelerator.num_processes == 1 else self.accelerator.gather(here)
        return cast(list[list[float]], cast(torch.Tensor, everywhere).tolist())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer's, which calls it before the optimizer's step; checks losses, gradients and signals.

        All processes stop together: if one stopped alone, the others would wait for its gradients.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's is a DTensor
        losses = torch.stack(self._batch_losses).isfinite().all()
        found = self._of_all_processes(losses, self._request.number, 0.0 if whole is None else whole)
        finite_losses, signals, norms = zip(*found, strict=True)
        self.stopping = int(max(signals))
        if not all(finite_losses):
            self._stop_for_loss()
        faults = [each for each in norms if not math.isfinite(each)]
        # Under fp16 an overflow is no fault: the scaler skips the step and lowers its scale.
        if faults and self.accelerator.scaler is None:
            self._stop(f"the gradient norm of step {self.state.global_step + 1} is {faults[0]}", self._batches)
        if not faults and self._gradients is not None:
            self._gradients.check(self._of_all_processes)
            self._gradients = None
        self._batches, self._batch_losses = [], []
        return norm

    def after_step(self, control: TrainerControl) -> None:
        """Checks the frozen weights after the first step, and ends training if a signal was received."""
        if self._steps == 0 and self._frozen is not None:
            self.engine.reshard(self.adapted)
            self._frozen.check(self.adapted)
        self._steps += 1
        if control.should_training_stop and not self.stopping:  # the last step, after which signals are not exchanged
            self.stopping = int(max(signal for (signal,) in self._of_all_processes(self._request.number)))
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def _stop_for_loss(self) -> NoReturn:
        """Stops for the first loss of this step that is not finite, here or in another process."""
        losses = torch.stack(self._batch_losses).tolist()
        at = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), -1)
        elsewhere = " here and not finite in another process" if math.isfinite(losses[at]) else ""
        self._stop(f"the loss of step {self.state.global_step + 1} is {losses[at]}{elsewhere}", [self._batches[at]])

    def _stop(self, what: str, batches: list[dict[str, np.ndarray]]) -> NoReturn:
        kept = newest_checkpoint(str(self.args.output_dir))
        rows = describe_rows(batches, self.training_rows(), cast(PreTrainedTokenizerBase, self.processing_class))
        raise UserError(
            f"{what}, on {rows}, so training stopped; {f'{kept} is kept' if kept else 'nothing had been saved yet'}; "
            f"lower learning_rate (now {self.args.learning_rate:g}) or train in float32"
        )

    def training_rows(self) -> list[list[int]]:
        """Token ids of the training rows, in order."""
        return list(cast(Any, self.train_dataset)["input_ids"])
