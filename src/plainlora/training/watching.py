"""Checks during training: trained weights get gradients, frozen ones do not change, losses and gradients are finite.

Each of these has failed silently in other projects: layers without gradients under gradient checkpointing
(open-unlearning#178), an adapter without effect (peft#2566), a loss that became NaN and was logged as 0.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from plainlora.lora.errors import some
from plainlora.lora.numerics import is_finite
from plainlora.lora.storage.tensors import inner_tensors
from plainlora.lost_process import describe_lost, is_of_another_process
from plainlora.run.checkpoints import newest_checkpoint
from plainlora.training.engines.engine import shard_of
from plainlora.training.engines.trainer import EngineTrainer

OF_ALL_STEPS = ("train_loss", "train_samples_per_second", "train_steps_per_second")  # Trainer's names
SAMPLED = 64  # values of each frozen weight that are compared
ROWS = "rows_on_host"  # the entry of a training batch that stays on the host
ROW_PARTS = ("input_ids", "attention_mask", "position_ids")  # from which a batch's rows are recovered


@dataclass(frozen=True)
class Matrices:
    """The trained weights of one LoRA layer: A, `(r, d_in)`, and B, `(d_out, r)`."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter


def lora_matrices(model: nn.Module) -> dict[str, Matrices]:
    """Every LoRA layer's A and B by the layer's name, for any back end: PEFT's names contain `default`."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if match := re.fullmatch(r"(.*)\.(lora_[AB])(\.default)?\.weight", name):
            found.setdefault(match[1], {})[match[2]] = parameter
    return {layer: Matrices(**sides) for layer, sides in found.items()}


def _are_zero(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each tensor is all zeros, with one transfer from the device."""
    if not tensors:
        return []
    norms = torch._foreach_norm([tensor.detach().float() for tensor in tensors], torch.inf)
    return [norm == 0 for norm in torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()]


class FirstGradients:
    """Checks in the first step that every trained weight gets a gradient, by hooks in the backward pass.

    B is 0 then, so the gradient of A is 0, and that of B must not be. Without an adapter a trained weight of the base
    may have a gradient of 0, but the loss must depend on it. Hooks are needed because an engine that shards gradients
    leaves none on the parameters after the backward pass.

    Args:
        model: The model before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = lora_matrices(model)
        self._largest: dict[int, torch.Tensor] = {}  # absolute value of each weight's gradient
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._own = {} if self._layers else trained
        sides = [side for layer in self._layers.values() for side in (layer.lora_A, layer.lora_B)]
        sides += self._own.values()
        self._hooks = [side.register_hook(partial(self._note, id(side))) for side in sides if side.requires_grad]

    def _note(self, side: int, gradient: torch.Tensor) -> None:
        largest = gradient.detach().abs().max().float()
        self._largest[side] = torch.maximum(largest, self._largest.get(side, largest))

    def check(self, of_all_processes: Callable[..., list[list[float]]]) -> None:
        """Raises `UserError` if an adapter or a weight would not be trained; the error names the first ones.

        Args:
            of_all_processes: Returns the given numbers of every process.
        """
        for hook in self._hooks:
            hook.remove()
        if self._own:
            self._check_own(of_all_processes)
        if not self._layers:
            return
        sides = [side for layer in self._layers.values() for side in (layer.lora_A, layer.lora_B)]
        here = [self._largest.get(id(side), 0.0) for side in sides]  # read with one transfer from the device
        found = [max(column) for column in zip(*of_all_processes(*here), strict=True)]
        without = [name for at, name in enumerate(self._layers) if found[2 * at] == found[2 * at + 1] == 0]
        if without:
            raise UserError(
                f"{len(without)} of {len(self._layers)} adapters got no gradient in the first step ({some(without)}), "
                "so they would not be trained: the loss does not depend on them; leave them out with "
                "lora_exclude_modules"
            )

    def _check_own(self, of_all_processes: Callable[..., list[list[float]]]) -> None:
        here = [float(id(each) in self._largest) for each in self._own.values()]
        found = [max(column) for column in zip(*of_all_processes(*here), strict=True)]
        if without := [name for name, reached in zip(self._own, found, strict=True) if not reached]:
            raise UserError(
                f"{len(without)} of {len(found)} weights got no gradient in the first step ({some(without)}), so they "
                "would not be trained: the loss does not depend on them; name the modules that are to be trained with "
                "--method last_layers --last_layers"
            )


def check_effect(model: nn.Module, steps: int) -> None:
    """Checks after training that every adapter has an effect: neither A nor B is all zeros.

    Args:
        model: A model with or without adapters.
        steps: Number of optimizer steps taken.

    Raises:
        UserError: An adapter has no effect; the error names its layer.
    """
    layers = lora_matrices(model)
    zero = _are_zero([side for layer in layers.values() for side in (layer.lora_A, layer.lora_B)])
    without = [name for at, name in enumerate(layers) if zero[2 * at] or zero[2 * at + 1]]
    if without:
        raise UserError(
            f"after {steps} step{'s' * (steps != 1)} {len(without)} of {len(layers)} adapters change nothing "
            f"({some(without)}), so nothing was saved; raise learning_rate, or train for longer: a warm-up begins "
            "with a rate of 0"
        )


def check_values(model: nn.Module) -> None:
    """Checks before a save that every trained weight is finite and not empty (empty ones were saved in peft#1443).

    Raises:
        UserError: A weight is not; the error names the first.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (parameter.numel() and is_finite(parameter.detach())):
            fault = "holds values that are not finite" if parameter.numel() else "is empty"
            raise UserError(
                f"{name} {fault}, so the model was not saved; what was saved before is untouched; lower "
                "learning_rate, or train in float32"
            )


class FrozenWeights:
    """Digests of some values of every frozen weight, or of this process's part, to check later that none has changed.

    Args:
        model: The model before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = self._digests(model)

    @staticmethod
    @torch.no_grad()
    def _digests(model: nn.Module) -> dict[str, str]:
        digests = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and shard_of(parameter).numel():
                digest = hashlib.sha256()
                for values in inner_tensors(shard_of(parameter)):
                    flat = values.flatten()
                    sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].contiguous().cpu()
                    digest.update(sample.view(torch.uint8).numpy().tobytes())
                digests[name] = digest.hexdigest()
        return digests

    def check(self, model: nn.Module) -> None:
        """Raises `UserError` if a frozen weight has changed; the error names it."""
        now = self._digests(model)
        moved = [name for name, digest in self._before.items() if now.get(name, digest) != digest]
        if moved:
            raise UserError(
                f"{len(moved)} of {len(self._before)} frozen weights changed in the first step ({some(moved)}); "
                "this is a fault of the program: please report it with the command"
            )


def rows_on_host(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copies of the tensors from which a batch's rows are recovered; a transfer each if they are on a device.

    Not views: a loader's worker moves the tensors to shared memory, which frees their own.
    """
    return {name: batch[name].cpu().numpy().copy() for name in ROW_PARTS if name in batch}


@dataclass(frozen=True)
class KeepsRowsOnHost:
    """A collator that adds `rows_on_host` to its batches, as the entry `ROWS`.

    PyTorch's memory pinning and Accelerate leave arrays on the host. Otherwise the ids would be copied back from the
    device in every batch, and the host would wait until the device has finished all its work.

    Attributes:
        collator: The collator that makes the batch.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(self, examples: list[Any]) -> Any:
        """The collator's batch with the rows on the host."""
        batch = self.collator(examples)
        batch[ROWS] = rows_on_host(batch)
        return batch


def documents(batch: Mapping[str, Any]) -> list[list[int]]:
    """The rows of a batch as token ids, without padding and unpacked.

    Args:
        batch: A batch of tensors, or its `rows_on_host`.
    """
    found: list[list[int]] = []
    ids = batch["input_ids"]
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    for at, row in enumerate(ids.tolist()):
        if positions is not None:
            starts = [number for number, position in enumerate(positions[at].tolist()) if position == 0]
            found += [row[start:end] for start, end in zip(starts, [*starts[1:], len(row)], strict=True)]
        elif mask is not None and mask.ndim == 2:
            found.append([token for token, kept in zip(row, mask[at].tolist(), strict=True) if kept])
        else:
            found.append(row)
    return found


def describe_rows(
    batches: Iterable[Mapping[str, Any]], rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """The training rows of some batches, for a message: their numbers from 1, and the beginnings of the first ones.

    Args:
        batches: Collated batches, or their `rows_on_host`.
        rows: Token ids of the training rows, in order.
        tokenizer: Decodes the beginnings; `None` to leave them out.
    """
    number_of: dict[tuple[int, ...], int] = {}
    for number, row in enumerate(rows, 1):
        number_of.setdefault(tuple(row), number)
    texts = []
    for document in (each for batch in batches for each in documents(batch)):
        found = number_of.get(tuple(document))
        beginning = "" if tokenizer is None else " ".join(str(tokenizer.decode(document[:40])).split())[:60]
        texts.append(f"{found or '?'} {beginning!r}" if beginning else str(found or "?"))
    return f"row{'s' * (len(texts) != 1)} {some(texts)}"


class RowsSeen(TrainerCallback, ExportableState):
    """A digest of the batches in the order in which this process trained on them. It is saved in checkpoints.

    d <- SHA-256(d, token ids of the batch)
    """

    def __init__(self) -> None:
        self.digest = ""

    def add(self, ids: np.ndarray) -> None:
        """Adds a batch, `(rows, length)`."""
        self.digest = hashlib.sha256(self.digest.encode() + ids.tobytes()).hexdigest()

    def state(self) -> dict[str, Any]:
        """The content for a checkpoint, in Trainer's format."""
        return {"args": {}, "attributes": {"digest": self.digest}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the digest of the checkpoint that is resumed."""
        saved: Any = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__) or {}
        self.digest = saved.get("attributes", {}).get("digest", "")


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
        if control.should_training_stop and self.trainer.stopping:  # stopped in the middle of an epoch
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
        if self._steps < self.state.global_step:  # resumed: Trainer divides this part's figures by the steps of all
            for name in OF_ALL_STEPS:
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
