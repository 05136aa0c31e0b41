"""What a run needs of memory: weights, what is trained, its optimizer, and what a step holds."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from plainlora.resources.activations import count_evaluation_bytes, count_head_bytes, count_peak_bytes, least_bytes
from plainlora.resources.memory import free_memory, of_this_process, resident_memory
from plainlora.resources.model_states import ModelStates
from plainlora.resources.plan import Plan
from plainlora.resources.weights import bytes_by_format, weight_bytes

# A share of what is alive in the largest step. Of the thirteen runs of docs/footprint, on two CPU cores, ten held at
# most 0.28 of it more than is counted, one 0.43, and the two that compute activations again, in whose steps little is
# alive, 1.8 and 3.0 times of it. No GPU was measured; there it stands for what the caching allocator keeps.
MARGIN = 0.3


def margin(alive: int) -> int:
    """Bytes left for what is not counted in a step: an allocator's fragments, and what libraries set aside.

    Args:
        alive: Bytes of the step's tensors at most.
    """
    return int(MARGIN * alive)


def needed_bytes(states: ModelStates, alive: int) -> int:
    """Bytes that a run needs: what stands beside its steps, what is alive in the largest of them, and the margin.

    Args:
        states: What stands beside a step.
        alive: Bytes of the step's tensors at most.
    """
    return states.beside_step + alive + margin(alive)


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
        activations: What is alive in a step at most without gradient checkpointing, gradients as far as it makes them.
        activations_checkpointed: The same with it.
        evaluation: What is alive in an evaluation step at most.
        loss_head: The same of the loss of a language model, a part of the activations.
        margin: Beside what is alive in the largest step, see `MARGIN`.
        libraries: What this process holds already on a CPU: libraries and rows.
        mapped: Of a checkpoint on disk, pages that stay resident on a CPU beside the layers quantised from them.
        checkpointing: Whether the run computes activations again: as it was told to, or where they do not fit.
        at_least: What no such run does without, of `needed`, known without running the model's code.
        needed: What the run will hold beside what it holds already and beside pages that can go.
        peak: The most that the device's memory holds, margin included; on a CPU all that is resident.
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
    """What `_count_activations` found; `None` where a model's code does not run without values."""

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
            count_evaluation_bytes(plan.step(evaluates=True)),
            None if step.classifies else count_head_bytes(step),
        )
    except Exception:  # whatever a model's code raises when its tensors have no values
        return _Activations()


def count_memory(plan: Plan, base: PreTrainedModel, model: PreTrainedModel, states: ModelStates) -> MemoryNeed:
    """Adds up what one process holds at the same time.

    On a CPU the peak holds what this process holds already, so it should be asked where the libraries are loaded and
    the rows are tokenised. A merge after training loads the base once more and is not part of the peak.

    Args:
        plan: The run.
        base: Its base, on the `meta` device.
        model: The same with what is trained.
        states: What the process holds beside a step.
    """
    on_cpu = plan.device.type == "cpu"
    counted = _count_activations(plan)
    free = of_this_process(free_memory(plan.device), plan.device)
    checkpointing = plan.training.gradient_checkpointing
    if checkpointing is None:
        checkpointing = counted.kept is None or free is None or needed_bytes(states, counted.kept) > free
    training = counted.checkpointed if checkpointing else counted.kept
    # A checkpoint stays mapped on a CPU as long as one tensor of it is used as it lies there; where layers are
    # quantised, that is beside what they became. Such pages are resident, but go when others need them.
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
