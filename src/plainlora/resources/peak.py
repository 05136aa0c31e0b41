"""What a run needs of memory: weights, what is trained, its optimizer, and what a step holds."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from plainlora.errors import UserError, first_line
from plainlora.resources.activations import (
    Held,
    count_evaluation_bytes,
    count_head_bytes,
    count_peak_bytes,
    least_bytes,
)
from plainlora.resources.checkpointing import SHARE
from plainlora.resources.memory import free_memory, resident_memory
from plainlora.resources.plan import Plan
from plainlora.resources.weights import bytes_by_format, count_bytes, quantized_weights, weight_bytes
from plainlora.settings.arguments import optim_name


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one process; what a device's or a model's kind makes unknown is `None`.

    Attributes:
        weights: Of the frozen base, or of the whole model where its own weights are trained, as the run stores it.
        weights_by_format: The same in fp32, bf16 (or fp16), NF4, and NF4 with double quantisation.
        adapters: What is trained beside the base.
        gradients: Of all that is trained.
        optimizer: State of the optimizer.
        initial: A copy of the trained weights as they were, kept on the CPU where the model's own are trained.
        activations: What a step holds at most without gradient checkpointing, gradients as far as it makes them.
        activations_checkpointed: The same with it.
        evaluation: What an evaluation step holds at most.
        loss_head: What the loss of a language model holds at most, a part of the activations.
        holes: Of a CPU's heap, see `plainlora.resources.activations.Held`.
        libraries: What this process holds already on a CPU: libraries and rows.
        mapped: Of a checkpoint on disk, pages that stay resident on a CPU beside the layers quantised from them.
        checkpointing: Whether the run computes activations again: as it was told to, or where they do not fit.
        at_least: What no such run does without, of `needed`, known without running the model's code.
        needed: What the run will hold beside what it holds already and beside pages that can go.
        peak: The most that the device's memory holds; on a CPU all that is resident.
        free: What is free of it, for each process.
        fits: Whether what is needed is not more than that; also known where what is needed at least is more.
    """

    weights: int
    weights_by_format: dict[str, int]
    adapters: int
    gradients: int
    optimizer: int
    initial: int
    activations: int | None
    activations_checkpointed: int | None
    evaluation: int | None
    loss_head: int | None
    holes: int | None
    libraries: int
    mapped: int
    checkpointing: bool
    at_least: int
    needed: int | None
    peak: int | None
    free: int | None
    fits: bool | None


def optimizer_bytes(training: TrainingArguments, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the state that `training.optim` keeps, made by the optimizer's own code on the `meta` device.

    Args:
        training: Which optimizer.
        parameters: What it trains, of any device.

    Raises:
        UserError: It cannot be made here: a package is missing, or it makes no state without values.
    """
    shapes = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    if not shapes:
        return 0
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer = kind(shapes, **{name: value for name, value in options.items() if name != "fused"})
        if hasattr(optimizer, "init_state"):  # bitsandbytes', whose steps need values; paged state has the same size
            optimizer.is_paged = False
            for index, parameter in enumerate(shapes):
                optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        else:
            for parameter in shapes:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
    except Exception as error:  # of many libraries
        reason = first_line(error)
        raise UserError(f"optim {optim_name(training)}: it cannot be made here ({reason}); choose another") from error
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    return sum({tensor.untyped_storage()._cdata: tensor.nbytes for tensor in state}.values())


@dataclass(frozen=True)
class _Activations:
    """What `_count_activations` found; `None` where a model's code does not run without values."""

    kept: Held | None = None
    checkpointed: Held | None = None
    evaluation: Held | None = None
    head: Held | None = None


def _count_activations(plan: Plan) -> _Activations:
    step = plan.step()
    try:
        return _Activations(
            count_peak_bytes(step),
            count_peak_bytes(step, checkpointing=True),
            count_evaluation_bytes(plan.step(evaluates=True)),
            None if step.classifies else count_head_bytes(step),
        )
    except Exception:  # whatever a model's code raises when its tensors have no values
        return _Activations()


def _alive(held: Held | None) -> int | None:
    return None if held is None else held.alive


def count_memory(plan: Plan, base: PreTrainedModel, model: PreTrainedModel) -> MemoryNeed:
    """Adds up what one process holds at the same time.

    On a CPU the peak holds what this process holds already, so it should be asked where the libraries are loaded and
    the rows are tokenised. A merge after training loads the base once more and is not part of the peak.

    Args:
        plan: The run.
        base: Its base, on the `meta` device.
        model: The same with what is trained.

    Raises:
        UserError: The optimizer cannot be made here.
    """
    training, on_cpu = plan.training, plan.device.type == "cpu"
    counted = _count_activations(plan)
    quantization = plan.quantization
    quantized = {} if quantization is None else quantized_weights(base, quantization, plan.dtype)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, optimizer = count_bytes(trainable), optimizer_bytes(training, trainable)
    weights = weight_bytes(base, quantization, plan.dtype)
    adapters = count_bytes(model.parameters()) - count_bytes(base.parameters())
    parts = weights + adapters + optimizer + (gradients if training.gradient_accumulation_steps > 1 else 0)
    # One quantised weight at a time is made dense, in the type of the base.
    parts += max((parameter.numel() for parameter in quantized.values()), default=0) * plan.dtype.itemsize
    initial = 0 if plan.lora is not None else gradients
    parts += initial if on_cpu else 0

    free = free_memory(plan.device)
    if free is not None and on_cpu:
        free //= PartialState().num_processes
    checkpointing = training.gradient_checkpointing
    if checkpointing is None:
        checkpointing = counted.kept is None or free is None or counted.kept.resident > SHARE * (free - parts)
    held = counted.checkpointed if checkpointing else counted.kept
    # A checkpoint stays mapped on a CPU as long as one tensor of it is used as it lies there; where layers are
    # quantised, that is beside what they became. Such pages are resident, but go when others need them.
    mapped = weight_bytes(base, None, plan.dtype) if on_cpu and quantized and plan.stored_dtype == plan.dtype else 0
    libraries = resident_memory() if on_cpu else 0
    at_least = parts + least_bytes(plan.step(), model)
    needed = holes = None
    if held is not None and counted.evaluation is not None:
        steps_held = max(held.resident_with(counted.evaluation.events), counted.evaluation.resident)
        holes = steps_held - max(held.alive, counted.evaluation.alive)
        needed = parts + steps_held
    return MemoryNeed(
        weights=weights,
        weights_by_format=bytes_by_format(base, plan.dtype),
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        initial=initial,
        activations=_alive(counted.kept),
        activations_checkpointed=_alive(counted.checkpointed),
        evaluation=_alive(counted.evaluation),
        loss_head=_alive(counted.head),
        holes=holes,
        libraries=libraries,
        mapped=mapped,
        checkpointing=bool(checkpointing),
        at_least=at_least,
        needed=needed,
        peak=None if needed is None else libraries + mapped + needed,
        free=free,
        fits=_fits(at_least, needed, free),
    )


def _fits(at_least: int, needed: int | None, free: int | None) -> bool | None:
    if free is None:
        return None
    if needed is None:
        return False if at_least > free else None
    return needed <= free
