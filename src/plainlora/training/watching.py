"""What is watched while a run trains: that every adapter learns, that nothing else moves, that numbers stay finite.

Each of these has gone wrong silently somewhere: layers that gradient checkpointing cut off (open-unlearning#178), an
adapter without effect (peft#2566), a loss that became NaN and was logged as 0.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
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
from plainlora.lora.storage.dense import inner_tensors
from plainlora.run.checkpoints import newest_checkpoint

OF_ALL_STEPS = ("train_loss", "train_samples_per_second", "train_steps_per_second")  # as Trainer names them
SAMPLED = 64  # values of each frozen weight that are watched
ROWS = "rows_on_host"  # the entry of a training batch that never leaves the host
ROW_PARTS = ("input_ids", "attention_mask", "position_ids")  # what tells a batch's rows apart


@dataclass(frozen=True)
class Matrices:
    """The trained weights of one LoRA layer: A, `(r, d_in)`, and B, `(d_out, r)`."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter


def lora_matrices(model: nn.Module) -> dict[str, Matrices]:
    """Every LoRA layer's A and B, by the layer's name; of either back end, whose names differ by `default`."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if match := re.fullmatch(r"(.*)\.(lora_[AB])(\.default)?\.weight", name):
            found.setdefault(match[1], {})[match[2]] = parameter
    return {layer: Matrices(**sides) for layer, sides in found.items()}


def _are_zero(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Which tensors hold nothing but zeros, with one transfer from the device."""
    if not tensors:
        return []
    norms = torch._foreach_norm([tensor.detach().float() for tensor in tensors], torch.inf)
    return [norm == 0 for norm in torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()]


def check_gradients(model: nn.Module) -> None:
    """Every adapter must have got a gradient. At the first step that of A is 0, because B is; that of B is not.

    Call it before the first optimizer step.

    Raises:
        UserError: Naming the layers that would not be trained.
    """
    layers = lora_matrices(model)
    without = [name for name, layer in layers.items() if layer.lora_A.grad is None and layer.lora_B.grad is None]
    rest = {name: layer for name, layer in layers.items() if name not in set(without)}
    sides = [side.grad for layer in rest.values() for side in (layer.lora_A, layer.lora_B)]
    zero = _are_zero([torch.zeros(1) if gradient is None else gradient for gradient in sides])
    without += [name for at, name in enumerate(rest) if zero[2 * at] and zero[2 * at + 1]]
    if without:
        raise UserError(
            f"{len(without)} of {len(layers)} adapters got no gradient in the first step ({some(without)}), so they "
            "would not be trained: the loss does not depend on them; leave them out with lora_exclude_modules"
        )


def check_effect(model: nn.Module, steps: int) -> None:
    """Every adapter must change something: neither A nor B may be all zeros when training ends.

    Args:
        model: With adapters, or without any.
        steps: Optimizer steps that were taken.

    Raises:
        UserError: Naming the layers without effect.
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
    """Every trained weight that is to be saved must be there and finite: tensors of size 0 were saved in peft#1443.

    Raises:
        UserError: Naming the first that is not.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (parameter.numel() and is_finite(parameter.detach())):
            fault = "holds values that are not finite" if parameter.numel() else "is empty"
            raise UserError(
                f"{name} {fault}, so the model was not saved; what was saved before is untouched; lower "
                "learning_rate, or train in float32"
            )


class FrozenWeights:
    """A digest of some values of every weight that is not to be trained.

    Args:
        model: At the start of training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = self._digests(model)

    @staticmethod
    @torch.no_grad()
    def _digests(model: nn.Module) -> dict[str, str]:
        digests = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and parameter.numel():
                digest = hashlib.sha256()
                for values in inner_tensors(parameter):
                    flat = values.flatten()
                    sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].contiguous().cpu()
                    digest.update(sample.view(torch.uint8).numpy().tobytes())
                digests[name] = digest.hexdigest()
        return digests

    def check(self, model: nn.Module) -> None:
        """Raises `UserError` if one of them has changed, naming it."""
        now = self._digests(model)
        moved = [name for name, digest in self._before.items() if now.get(name, digest) != digest]
        if moved:
            raise UserError(
                f"{len(moved)} of {len(self._before)} frozen weights changed in the first step ({some(moved)}); "
                "this is a fault of the program: please report it with the command"
            )


def rows_on_host(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What tells a batch's rows apart, as arrays of their own; where it lies on a device, that is a transfer for each.

    They are no views of the tensors, whose memory goes when a worker of the loader moves them to shared memory.
    """
    return {name: batch[name].cpu().numpy().copy() for name in ROW_PARTS if name in batch}


@dataclass(frozen=True)
class KeepsRowsOnHost:
    """A collator whose batches carry `rows_on_host` under the name `ROWS`.

    Neither Torch's pinning of memory nor accelerate moves or copies an array. Otherwise the ids would have to come
    back from the device in every batch, and the host would wait until the device has done all it was given before.

    Attributes:
        collator: Makes the batch.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(self, examples: list[Any]) -> Any:
        """The collator's batch, and the rows beside it."""
        batch = self.collator(examples)
        batch[ROWS] = rows_on_host(batch)
        return batch


def documents(batch: Mapping[str, Any]) -> list[list[int]]:
    """The rows of a batch as token ids: without padding, and, where several were packed into one, apart again.

    Args:
        batch: Of tensors, or `rows_on_host` of it.
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
    """Which training rows some batches are made of: their numbers, from 1, and how the first ones begin.

    Args:
        batches: As collated, or `rows_on_host` of them.
        rows: Token ids of the training rows, in the order in which they were kept.
        tokenizer: To show how a row begins.
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
    """A digest of the batches in the order in which this process trained on them. Checkpoints carry it on.

    d <- SHA-256(d, token ids of the batch)
    """

    def __init__(self) -> None:
        self.digest = ""

    def add(self, ids: np.ndarray) -> None:
        """One batch, `(rows, length)`."""
        self.digest = hashlib.sha256(self.digest.encode() + ids.tobytes()).hexdigest()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in Trainer's format."""
        return {"args": {}, "attributes": {"digest": self.digest}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Goes on from the digest of the checkpoint that is resumed."""
        saved: Any = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__) or {}
        self.digest = saved.get("attributes", {}).get("digest", "")


class _AfterStep(TrainerCallback):
    """Tells a watched trainer that an optimizer step has been taken."""

    def __init__(self, trainer: "Watched") -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.after_step(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop and self.trainer.stopping:  # in the middle of an epoch, which has no end then
            control.should_save = control.should_evaluate = control.should_log = False


class Watched(Trainer):
    """Trainer that stops, saying what and where, as soon as training goes wrong, and in good order when asked to.

    A GPU works through what it was given while the host goes on; reading a number from it makes the host wait. So the
    losses of a step, its gradient norm and the signals are looked at together, with one transfer for each optimizer
    step, before the optimizer uses the gradients. Only DeepSpeed's has used them by then, in `backward` (accelerate's
    `DeepSpeedEngineWrapper`): training stops after that step, and nothing of it is saved.

    Attributes:
        adapted: The model without what the trainer wraps around it.
        seen: Digest of the rows that were trained on.
        stopping: The number of the signal that one process was sent, and for which all end training; 0 if there is
            none.
    """

    adapted: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen, self.stopping = RowsSeen(), 0
        self._request = StopRequest()
        self._batches: list[dict[str, np.ndarray]] = []  # since the last optimizer step
        self._batch_losses: list[torch.Tensor] = []  # theirs
        self._frozen: FrozenWeights | None = None
        self._steps = 0  # of this process
        self._gradients_checked = False
        self.add_callback(self.seen)
        self.add_callback(_AfterStep(self))

    def _is_sharded(self) -> bool:
        """Whether a process holds a part of each weight only, which says nothing about the whole."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains.

        Raises:
            UserError: Something went wrong that would otherwise go unnoticed.
            Stopped: SIGTERM or Ctrl-C came; there is a checkpoint of the step at which it came.
        """
        self._frozen = None if self._is_sharded() else FrozenWeights(self.adapted)
        self._steps, self._gradients_checked = 0, False
        self._batches, self._batch_losses = [], []
        with self._request.listening():
            outcome = super().train(*args, **kwargs)
        if self._steps < self.state.global_step:  # resumed: Trainer divides what one part took by the steps of all
            for name in OF_ALL_STEPS:
                outcome.metrics.pop(name, None)
        if self._request.number and not self.stopping:  # during what followed the last step
            stop_at_once(self._request.number)
        if self.stopping:
            step, output = self.state.global_step, self.args.output_dir
            message = (
                f"stopped after step {step} of {self.state.max_steps}; {output}/checkpoint-{step} is saved; go on "
                "with the same command and --resume_from_checkpoint true"
            )
            raise Stopped(self.stopping, message if self.is_world_process_zero() else "")
        return outcome

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As Trainer's; its batches carry their rows on the host too, see `KeepsRowsOnHost`.

        Not if one process collates for all (`dispatch_batches`): each would be given the rows of all.
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
        """One batch. Its loss is looked at before the optimizer's step, in `_get_grad_norm`."""
        rows = inputs.pop(ROWS, None) or rows_on_host(inputs)
        self.seen.add(rows["input_ids"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append(rows)
        self._batch_losses.append(loss)
        return loss

    def _of_all_processes(self, *values: torch.Tensor | float) -> list[list[float]]:
        """Numbers of every process, `(processes, values)`, with one transfer from the device."""
        device = self.args.device
        mine = [
            value.to(device, torch.float32)
            if isinstance(value, torch.Tensor)
            # Not torch.tensor(value): the host would wait for that copy too, where a GPU is told to fill in a number.
            else torch.full((), value, dtype=torch.float32, device=device)
            for value in values
        ]
        here = torch.stack(mine)[None]  # (1, values)
        everywhere = here if self.accelerator.num_processes == 1 else self.accelerator.gather(here)
        return cast(list[list[float]], cast(torch.Tensor, everywhere).tolist())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm that is logged, before the optimizer's step: the place to look at losses, gradients and signals.

        All processes stop or none does: one that stopped alone would leave the others waiting for its gradients.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's lies in all processes
        losses = torch.stack(self._batch_losses).isfinite().all()
        found = self._of_all_processes(losses, self._request.number, 0.0 if whole is None else whole)
        finite_losses, signals, norms = zip(*found, strict=True)
        self.stopping = int(max(signals))
        if not all(finite_losses):
            self._stop_for_loss()
        faults = [each for each in norms if not math.isfinite(each)]
        # Under fp16 an overflow is no fault: the scaler leaves the step out and lowers its scale.
        if faults and self.accelerator.scaler is None:
            self._stop(f"the gradient norm of step {self.state.global_step + 1} is {faults[0]}", self._batches)
        # Clipping by a norm that is not finite makes zeros of the finite gradients, which says nothing about them.
        if not faults and not self._gradients_checked and not self._is_sharded():
            check_gradients(self.adapted)
            self._gradients_checked = True
        self._batches, self._batch_losses = [], []
        return norm

    def after_step(self, control: TrainerControl) -> None:
        """Looks at the frozen weights after the first step, and ends training if that was asked for."""
        if self._steps == 0 and self._frozen is not None:
            self._frozen.check(self.adapted)
        self._steps += 1
        if control.should_training_stop and not self.stopping:  # the last step: nobody would ask again
            self.stopping = int(max(signal for (signal,) in self._of_all_processes(self._request.number)))
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def _stop_for_loss(self) -> NoReturn:
        """For the first loss of this step that is not finite, or for one of another process."""
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
        """Token ids of the training rows, in the order in which they were kept."""
        return list(cast(Any, self.train_dataset)["input_ids"])
