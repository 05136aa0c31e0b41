"""Whether what autograd keeps for the way back fits into the free memory, decided before training starts."""

import copy
from collections.abc import Callable

from accelerate import PartialState
from accelerate.utils import gather_object
from peft import LoraConfig
from transformers import PreTrainedModel
from trl import SFTConfig

from plainlora.backends import Backend, attach_adapter
from plainlora.errors import first_line
from plainlora.loss_head import base_of
from plainlora.resources.activations import Step, count_peak_bytes, largest_batch, precision
from plainlora.resources.weights import count_bytes

SHARE = 0.8  # of the free memory that is planned with; the rest is for fragments and for what libraries set aside
OPTIMIZER_COPIES = 3  # of every trained weight: its gradient and Adam's two moments


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
    frees = gather_object([free])
    if any(each is None for each in frees):
        say(f"free memory of {args.device} is unknown: gradient checkpointing")
        return True
    shared = PartialState().num_processes if args.device.type == "cpu" else 1
    trained = count_bytes(parameter for parameter in base.parameters() if parameter.requires_grad)
    left = min(frees) // shared - count_bytes((*base.parameters(), *base.buffers())) - OPTIMIZER_COPIES * trained
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
        held = count_peak_bytes(step).resident
    except Exception as error:  # whatever a model's code raises when its tensors have no values
        reason = f"{type(error).__name__}: {first_line(error)[:100]}"
        say(f"activations cannot be counted ({reason}): gradient checkpointing")
        return True
    fits = held <= SHARE * left
    say(
        f"activations: {held / 1e9:.1f} GB for {min(args.per_device_train_batch_size, rows)} x {longest} tokens, "
        f"{max(left, 0) / 1e9:.1f} GB free: {'no ' if fits else ''}gradient checkpointing"
    )
    return not fits
