"""Whether what autograd keeps for the way back fits into the free memory, decided before training starts."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import LoraConfig
from transformers import PreTrainedModel
from trl import SFTConfig

from plainlora.backends import Backend, attach_adapter
from plainlora.errors import first_line
from plainlora.loss_head import base_of
from plainlora.resources.activations import Held, Step, count_peak_bytes, largest_batch, precision
from plainlora.resources.model_states import count_model_states
from plainlora.resources.weights import stored_quantization

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


def needs_checkpointing(
    args: SFTConfig,
    base: PreTrainedModel,
    lora: LoraConfig,
    backend: Backend,
    adapter_dtype: str,
    longest: int,
    rows: int,
    free: int | None,
    say: Callable[[str], None],
) -> bool:
    """Whether training has to compute activations again on the way back, because they do not fit; says why.

    All processes come to the same decision: that of the one with the least memory.

    Args:
        args: Batch size, packing and precision.
        base: With the adapter in it.
        lora: That adapter.
        backend: What attached it.
        adapter_dtype: Its precision.
        longest: Length of the longest row, in tokens.
        rows: Of which there are so many.
        free: Bytes that were free before the base was loaded; `None` if that is unknown.
        say: Told the decision in one line.
    """
    if not base_of(base).supports_gradient_checkpointing:
        say(f"{type(base_of(base)).__name__} does not support gradient checkpointing")
        return False
    frees = [each for each in gather_object([of_this_process(free, args.device)]) if each is not None]
    if len(frees) < PartialState().num_processes:
        say(f"free memory of {args.device} is unknown: gradient checkpointing")
        return True
    step = Step(
        config=base.config,
        prepare=lambda skeleton: attach_adapter(skeleton, copy.deepcopy(lora), backend, adapter_dtype),
        batch=largest_batch(args, longest, min(args.per_device_train_batch_size, rows)),
        device=args.device,
        dtype=base.dtype,
        autocast=precision(args),
        one_pass_head=backend.one_pass_head,
        trust_remote_code=args.trust_remote_code,
    )
    try:
        bare, model = replace(step, prepare=lambda skeleton: None).build(), step.build()
        states = count_model_states(bare, model, args, stored_quantization(base.config), base.dtype).beside_step
        held = count_peak_bytes(step)
    except Exception as error:  # whatever a model's code raises when its tensors have no values
        reason = f"{type(error).__name__}: {first_line(error)[:100]}"
        say(f"memory cannot be counted ({reason}): gradient checkpointing")
        return True
    free = min(frees)
    fits = fits_beside(held, states, free)
    say(
        f"activations: {held.resident / 1e9:.1f} GB for {min(args.per_device_train_batch_size, rows)} x {longest} "
        f"tokens, {max(free - states, 0) / 1e9:.1f} GB free: {'no ' if fits else ''}gradient checkpointing"
    )
    return not fits
