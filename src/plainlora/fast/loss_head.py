"""Chooses the head that computes a run's loss: the fastest one that gives the model's own loss.

A fused head assumes that the logits are `W h + b`, with the last hidden states h and the output embedding W; TRL's
also knows some scales and caps by name. Some architectures have other layers, caps or factors there, or add terms to
the loss. So each head is compared with the model's own forward pass on tokens of the run, before the first step. A
head that gives another loss is not used.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from plainlora.errors import UserError, first_line
from plainlora.fast.head import LabelledTokens, entropy_of, fused_output, is_covered, one_pass_output

Form = Literal["one pass", "TRL", "own"]
TOKENS = 32  # with which heads are compared


def base_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PeftModel, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class LossHead:
    """Replaces the head that SFTTrainer gives a model (`trl.trainer.utils.add_fused_lm_head`).

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/utils.py

    Args:
        model: A causal language model that already has TRL's head.
        form: `one pass`: `plainlora.fast.head`. `TRL`: TRL's. `own`: the model's own forward, all logits at once.

    Attributes:
        with_statistics: Whether to compute token accuracy and entropy; TRL's head always does.
        extra: Whether the model's own loss has terms beyond cross entropy; the form `own` returns them as `aux_loss`.
        router: Whether `output_router_logits` is passed to the model, for those terms.
    """

    def __init__(self, model: PreTrainedModel, form: Form = "one pass") -> None:
        self.form, self.with_statistics, self.extra, self.router = form, True, False, False
        self._theirs: Callable[..., Any] = model.forward

        @functools.wraps(type(model).forward)  # `generate` computes positions and masks for what the signature names
        def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            return self._forward(model, *args, **kwargs)

        model.forward = MethodType(forward, model)

    def undo(self, model: PreTrainedModel) -> None:
        """Restores the head that the model had before."""
        model.forward = self._theirs

    def _forward(
        self,
        model: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None or shift_labels is not None or self.form == "TRL":
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None}
            return self._theirs(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        if self.form == "own":
            return self._own(*args, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        options: dict[str, Any] = {"num_items_in_batch": num_items_in_batch, "with_statistics": self.with_statistics}
        return one_pass_output(model, *args, labels=labels, **options, **kwargs)

    def _own(self, *args: Any, labels: torch.Tensor, num_items_in_batch: Any, **kwargs: Any) -> FusedCausalLMOutput:
        if not self.router:
            kwargs.pop("output_router_logits", None)
        given = {"labels": labels} if self.extra else {}
        output = self._theirs(*args, **given, **kwargs)
        tokens = LabelledTokens.find(labels)
        logits = _log_softmax(tokens.select(output.logits))  # (N, V)
        log_probs = logits.gather(1, tokens.labels[:, None])[:, 0]
        entropy = is_top1 = torch.zeros_like(log_probs)
        if self.with_statistics:
            with torch.no_grad():
                entropy, is_top1 = entropy_of(logits), (logits.argmax(-1) == tokens.labels).float()
        found = fused_output(tokens, log_probs, entropy, is_top1, num_items_in_batch)
        if self.extra:
            found.aux_loss = output.loss + log_probs.sum() / tokens.mask.sum().clamp(min=1)
        return found


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in at least fp32."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class HeadLoss:
    """The loss of one row by one head.

    Attributes:
        log_probs: Log-probability of each label, `(N,)`.
        extra: The terms of the loss beyond cross entropy.
    """

    log_probs: torch.Tensor
    extra: float

    @property
    def loss(self) -> float:
        """The loss in nats per token, `extra` included."""
        return self.extra - float(self.log_probs.mean())


@dataclass(frozen=True)
class OwnLoss(HeadLoss):
    """The loss of one row by the model's own forward.

    Attributes:
        rounding: How much a log-probability may differ if the same operations run in another order.
        extra_rounding: How much `extra` may differ.
    """

    rounding: float
    extra_rounding: float

    def differs(self, head: HeadLoss) -> float:
        """The difference of a head's loss in units of the rounding: at most 1 if it is the same loss."""
        log_probs = float((head.log_probs - self.log_probs).abs().max()) / self.rounding
        return max(log_probs, abs(head.extra - self.extra) / self.extra_rounding)


def rounding_unit(model: nn.Module) -> float:
    """The distance from 1 to the next number in the coarsest dtype that a model computes in (dimensionless).

    It is never finer than fp32, in which TRL's head computes. A model with int8 weights counts as bf16, because
    LLM.int8() rounds each row of activations to 8 bits.
    """
    parameters = list(model.parameters())
    types = {torch.float32} | {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    device = parameters[0].device.type
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    if any(parameter.dtype == torch.int8 for parameter in parameters):
        types.add(torch.bfloat16)
    return max(torch.finfo(dtype).eps for dtype in types)


def own_loss(model: nn.Module, ids: torch.Tensor, **options: Any) -> OwnLoss:
    """The loss that a model's own forward computes from labels.

    In half precision a logit is rounded once in each computation, by at most half a unit. A log-probability is the
    difference of two numbers of a logit's size, so two of them differ by at most 2 units of the largest logit. In fp32
    the order of the d sums matters instead: 64 units, the square root of 4096.

    Args:
        model: The model, with or without a `LossHead`, an adapter or a trainer's wrapper.
        ids: `(1, length)`; every token but the first is a label.
        **options: For the model's forward.
    """
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False, **options)
    logits = output.logits[0, :-1]
    log_probs = _log_softmax(logits).gather(1, ids[0, 1:, None])[:, 0]
    unit = rounding_unit(model)
    units = 2 if unit > 1e-6 else 64
    loss, loss_unit = float(output.loss), max(torch.finfo(each).eps for each in (torch.float32, output.loss.dtype))
    return OwnLoss(
        log_probs,
        loss + float(log_probs.mean()),
        rounding=units * unit * max(1.0, float(logits.abs().max())),
        extra_rounding=16 * loss_unit * max(1.0, abs(loss)),
    )


class LossChoice:
    """Chooses, once, the head that computes a trainer's loss.

    Args:
        trainer: An SFTTrainer.
        one_pass: Whether to try the one-pass head before TRL's.
    """

    def __init__(self, trainer: SFTTrainer, one_pass: bool) -> None:
        self.trainer, self.model = trainer, base_of(cast(nn.Module, trainer.model))
        self.head, self.made = LossHead(self.model, "TRL"), False
        self._aux = trainer.aux_loss_enabled, getattr(trainer, "router_aux_loss_coef", None)
        self._tried: list[Form] = ["one pass", "TRL"] if one_pass and is_covered(self.model) else ["TRL"]

    def undo(self) -> None:
        """Restores the model's head and the trainer's own loss."""
        self.head.undo(self.model)
        del self.trainer.compute_loss
        self.trainer.aux_loss_enabled, coefficient = self._aux
        if coefficient is not None:
            self.trainer.router_aux_loss_coef = coefficient

    def make(self, model: nn.Module, ids: Sequence[int]) -> None:
        """Compares the heads with the model's own forward; prints a line if no head gives the same loss.

        Args:
            model: The model as the trainer calls it, possibly wrapped.
            ids: Tokens of the run, at least two; the first 32 are used.
        """
        trainer, head = self.trainer, self.head
        self.made = True
        row = torch.tensor([list(ids[:TOKENS])], device=trainer.args.device)
        options = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
        fault = ""
        with evaluating(model), trainer.compute_loss_context_manager():
            try:
                own = own_loss(model, row, **options)
            except Exception as error:  # whatever a model's code raises
                name = type(self.model).__name__
                raise UserError(f"{name} fails on tokens and labels with this adapter: {first_line(error)}") from error
            for form in self._tried:
                head.form = form
                try:
                    found = self._loss_of_head(model, row, options)
                except Exception as error:  # such as a missing `last_hidden_state`: whatever a model's code raises
                    differs, fault = True, f"a fused head fails ({first_line(error)})"
                else:
                    differs, fault = own.differs(found) > 1, f"a fused head gives {found.loss:.6f}"
                if not trainer.accelerator.gather(torch.tensor([int(differs)], device=row.device)).any():
                    return
        head.form, head.router = "own", bool(options)
        head.extra = abs(own.extra) > own.extra_rounding
        # SFTTrainer adds `aux_loss` times this coefficient, as a mean over the accumulated batches.
        trainer.aux_loss_enabled, trainer.router_aux_loss_coef = head.extra, 1.0
        trainer.accelerator.print(
            f"loss: {type(self.model).__name__}'s own forward gives {own.loss:.6f} where {fault}; the model's "
            "own loss is used, which keeps all logits of a batch in memory"
        )

    def _loss_of_head(self, model: nn.Module, row: torch.Tensor, options: dict[str, Any]) -> HeadLoss:
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row, "use_cache": False}
        output = model(**inputs, fused_lm_head=True, **options)
        extra = self.trainer.router_aux_loss_coef * float(output.aux_loss) if options else 0.0
        return HeadLoss(output.log_probs[0], extra)


def use_own_loss(trainer: SFTTrainer, one_pass: bool) -> LossChoice:
    """Gives a trainer's model the fastest head that gives the model's own loss.

    The heads are compared before the first loss is computed. SFTTrainer appends token accuracy and entropy to lists at
    every step and logs their means. Other heads than TRL's compute the two at logging steps only, so the other steps'
    entries are removed again.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py (`compute_loss`)

    Args:
        trainer: An SFTTrainer of a causal language model, with or without an adapter.
        one_pass: Whether to try the one-pass head before TRL's.

    Returns:
        The choice, whose `make` may be called earlier.
    """
    choice, theirs = LossChoice(trainer, one_pass), cast(Callable[..., Any], trainer.compute_loss)
    head = choice.head

    def is_logged() -> bool:
        if trainer.args.logging_strategy == "epoch":  # then the means of all steps are logged
            return True
        step, every = trainer.state.global_step + 1, int(trainer.state.logging_steps)
        return step % max(every, 1) == 0 or (step == 1 and trainer.args.logging_first_step)

    def compute_loss(wrapped: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """SFTTrainer's `compute_loss`; figures that were not computed are removed from its logs."""
        if not choice.made:
            choice.make(wrapped, inputs["input_ids"].flatten().tolist())
        head.with_statistics = not wrapped.training or is_logged() or head.form == "TRL"
        try:
            loss = theirs(wrapped, inputs, *args, **kwargs)
            if not head.with_statistics:
                logged = trainer._metrics["train"]
                for name in ("entropy", "mean_token_accuracy"):
                    logged[name].pop()
                    if not logged[name]:  # SFTTrainer divides by their number if training ends between two logs
                        del logged[name]
            return loss
        finally:
            head.with_statistics = True

    trainer.compute_loss = compute_loss  # type: ignore[assignment]
    return choice


def use_one_pass_head(trainer: SFTTrainer) -> SFTTrainer:
    """Gives a trainer's model the one-pass head, and computes token accuracy and entropy at logging steps only.

    In an existing TRL + PEFT script, add one line after the trainer is made. TRL's head stays if the output embedding
    is trained or adapted, or if the one-pass head does not give the model's own loss. If TRL's head does not give it
    either, the model's own forward computes the loss. Which one is used is measured before the first step.

    Args:
        trainer: An SFTTrainer of a causal language model, with or without an adapter.

    Returns:
        The same trainer.
    """
    vars(trainer)["loss_choice"] = use_own_loss(trainer, one_pass=True)  # for `plainlora.unfuse`
    return trainer
