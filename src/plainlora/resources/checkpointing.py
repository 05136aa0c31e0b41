"""Whether what autograd keeps for the backward pass fits into the free memory, decided before training starts."""

from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from plainlora.errors import first_line
from plainlora.resources.activations import Held, count_peak_bytes
from plainlora.resources.model_states import count_model_states
from plainlora.resources.plan import Plan

SHARE = 0.8  # of the free memory that is planned with; the rest is for fragments and for what libraries set aside


def of_this_process(free: int | None, device: torch.device) -> int | None:
    """Of a device's free bytes those for one process: a CPU's memory is shared by all, a GPU has one process."""
    return None if free is None else free // PartialState().num_processes if device.type == "cpu" else free


def fits_beside(held: Held, states: int, free: int) -> bool:
    """Whether a step fits without gradient checkpointing.

    Args:
        held: By the step.
        states: Bytes that stand beside it, see `plainlora.resources.model_states`.
        free: Bytes that were free before either was there.
    """
    return held.resident <= SHARE * (free - states)


def needs_checkpointing(plan: Plan, free: int | None, log: Callable[[str], None]) -> bool:
    """Whether training has to compute activations again in the backward pass, because they do not fit; says why.

    All processes come to the same decision: that of the one with the least memory.

    Args:
        plan: The run.
        free: Bytes that were free before the base was loaded; `None` if that is unknown.
        log: Told the decision in one line.
    """
    step, device = plan.step(), plan.device
    frees = [each for each in gather_object([of_this_process(free, device)]) if each is not None]
    if len(frees) < PartialState().num_processes:
        log(f"free memory of {device} is unknown: gradient checkpointing")
        return True
    try:
        bare, model = replace(step, prepare=lambda skeleton: None).build(), step.build()
        if not bare.supports_gradient_checkpointing:
            log(f"{type(bare).__name__} does not support gradient checkpointing")
            return False
        states = count_model_states(bare, model, plan.training, plan.quantization, plan.dtype).beside_step
        held = count_peak_bytes(step)
    except Exception as error:  # whatever a model's code raises when its tensors have no values
        reason = f"{type(error).__name__}: {first_line(error)[:100]}"
        log(f"memory cannot be counted ({reason}): gradient checkpointing")
        return True
    free, rows = min(frees), min(plan.training.per_device_train_batch_size, plan.rows)
    fits = fits_beside(held, states, free)
    log(
        f"activations: {held.resident / 1e9:.1f} GB for {rows} x {plan.longest} tokens, "
        f"{max(free - states, 0) / 1e9:.1f} GB free: {'no ' if fits else ''}gradient checkpointing"
    )
    return not fits
