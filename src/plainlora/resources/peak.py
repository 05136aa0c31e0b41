"""The memory that a run needs: weights, adapter, optimizer state, and the peak of a step."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from plainlora.resources.activations import count_evaluation_bytes, count_head_bytes, count_peak_bytes, least_bytes
from plainlora.resources.memory import free_memory, of_this_process, resident_memory
from plainlora.resources.model_states import ModelStates
from plainlora.resources.plan import Plan
from plainlora.resources.weights import bytes_by_format, weight_bytes

# A share of the step's peak. Of the thirteen runs of docs/footprint, on two CPU cores, ten exceeded the count by at
# most 0.28 of that peak, one by 0.43, and the two with checkpointing, whose peaks are small, by 1.8 and 3.0 times. No
# GPU was measured; there the margin is for what the caching allocator keeps.
MARGIN = 0.3


def margin(alive: int) -> int:
    """Bytes for what is not counted in a step: the allocator's fragments and the libraries' buffers.

    Args:
        alive: The peak bytes of the step.
    """
    return int(MARGIN * alive)


def needed_bytes(states: ModelStates, alive: int) -> int:
    """Bytes that a run needs: what is held beside a step, the step's peak, and the margin.

    Args:
        states: The bytes held beside a step.
        alive: The peak bytes of the step.
    """
    return states.beside_step + alive + margin(alive)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one process. A figure that is unknown for the device or the model is `None`.

    Attributes:
        weights: The frozen base as the run stores it, or the whole model if its own weights are trained.
        weights_by_format: The same weights in fp32, bf16 (or fp16), NF4, and NF4 with double quantisation.
        adapters: The weights trained beside the base.
        gradients: The gradients of all trained weights.
        optimizer: The optimizer's state.
        initial: A copy of the initial weights, kept on the CPU if the model's own weights are trained.
        activations: The peak of a training step without gradient checkpointing, including the gradients that it makes.
        activations_checkpointed: The same with gradient checkpointing.
        evaluation: The peak of an evaluation step.
        loss_head: The peak of a language model's loss alone, which is part of the activations.
        margin: See `MARGIN`.
        libraries: On a CPU, what this process holds already: libraries and rows.
        mapped: On a CPU, the checkpoint's pages that stay resident beside the layers quantised from them.
        checkpointing: Whether the run computes activations again: by its setting or, if that is left open, if they do
            not fit.
        at_least: A lower bound of `needed` that is known without running the model's code.
        needed: What the run will hold in addition to `libraries` and `mapped`, margin included.
        peak: The most that the process will hold, margin included; on a CPU all that is resident.
        free: The free memory of the device, for each process.
        fits: Whether `needed` is at most `free`; false also if only `at_least` is known and exceeds it.
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
    margin: int | None
    libraries: int
    mapped: int
    checkpointing: bool
    at_least: int
    needed: int | None
    peak: int | None
    free: int | None
    fits: bool | None


@dataclass(frozen=True)
class _Activations:
    """The result of `_count_activations`; `None` if the model's code does not run on tensors without values."""

    kept: int | None = None
    checkpointed: int | None = None
    evaluation: int | None = None
    head: int | None = None


def _count_activations(plan: Plan) -> _Activations:
    step = plan.step()
    try:
        return _Activations(
            count_peak_bytes(step),
            count_peak_bytes(step, checkpointing=True),
            0 if plan.evaluated == 0 else count_evaluation_bytes(plan.step(evaluates=True)),
            None if step.classifies else count_head_bytes(step),
        )
    except Exception:  # whatever a model's code raises when its tensors have no values
        return _Activations()


def count_memory(plan: Plan, base: PreTrainedModel, model: PreTrainedModel, states: ModelStates) -> MemoryNeed:
    """Adds up what one process holds at the same time.

    On a CPU the peak includes what this process holds already, so call it after the libraries are loaded and the rows
    are tokenised. A merge after training loads the base once more and is not part of the peak.

    Args:
        plan: The run.
        base: Its base, on the `meta` device.
        model: The base as it is trained, with its adapter if there is one.
        states: The bytes held beside a step.
    """
    on_cpu = plan.device.type == "cpu"
    counted = _count_activations(plan)
    free = of_this_process(free_memory(plan.device), plan.device)
    checkpointing = plan.training.gradient_checkpointing
    if checkpointing is None:
        checkpointing = counted.kept is None or free is None or needed_bytes(states, counted.kept) > free
    training = counted.checkpointed if checkpointing else counted.kept
    # On a CPU a checkpoint stays memory-mapped as long as one of its tensors is used as stored; quantised layers are
    # held in addition. Mapped pages are resident, but the kernel drops them when memory is short.
    stays = on_cpu and states.dense and plan.stored_dtype == plan.dtype
    mapped = weight_bytes(base, None, plan.dtype) if stays else 0
    libraries = resident_memory() if on_cpu else 0
    at_least = states.beside_step + least_bytes(plan.step(), model)
    needed = left = None
    if training is not None and counted.evaluation is not None:
        alive = max(training, counted.evaluation)
        needed, left = needed_bytes(states, alive), margin(alive)
    return MemoryNeed(
        weights=states.weights,
        weights_by_format=bytes_by_format(base, plan.dtype),
        adapters=states.adapters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        initial=states.initial,
        activations=counted.kept,
        activations_checkpointed=counted.checkpointed,
        evaluation=counted.evaluation,
        loss_head=counted.head,
        margin=left,
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
