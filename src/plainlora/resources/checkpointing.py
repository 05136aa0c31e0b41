"""Decides before training starts whether a step fits into the free memory, or needs gradient checkpointing."""

from collections.abc import Callable

from accelerate import PartialState
from accelerate.utils import gather_object

from plainlora.errors import first_line
from plainlora.resources.activations import count_peak_bytes
from plainlora.resources.memory import of_this_process
from plainlora.resources.model_states import count_model_states
from plainlora.resources.peak import margin, needed_bytes
from plainlora.resources.plan import Plan


def needs_checkpointing(plan: Plan, free: int | None, log: Callable[[str], None]) -> bool:
    """Whether training has to compute activations again in the backward pass, because they do not fit.

    All processes come to the same decision, by the least free memory among them.

    Args:
        plan: The run.
        free: Bytes that were free before the base was loaded; `None` if that is unknown.
        log: Called with one line: the decision and the reason.
    """
    device = plan.device
    frees = [each for each in gather_object([of_this_process(free, device)]) if each is not None]
    if len(frees) < PartialState().num_processes:
        log(f"free memory of {device} is unknown: gradient checkpointing")
        return True
    try:
        base, model = plan.build()
        if not base.supports_gradient_checkpointing:
            log(f"{type(base).__name__} does not support gradient checkpointing")
            return False
        states, alive = count_model_states(plan, base, model), count_peak_bytes(plan.step())
    except Exception as error:  # whatever a model's code raises when its tensors have no values
        reason = f"{type(error).__name__}: {first_line(error)[:100]}"
        log(f"memory cannot be counted ({reason}): gradient checkpointing")
        return True
    free, rows = min(frees), min(plan.training.per_device_train_batch_size, plan.rows)
    fits = needed_bytes(states, alive) <= free
    log(
        f"activations: {(alive + margin(alive)) / 1e9:.1f} GB for {rows} x {plan.longest} tokens, "
        f"{max(free - states.beside_step, 0) / 1e9:.1f} GB free: {'no ' if fits else ''}gradient checkpointing"
    )
    return not fits
