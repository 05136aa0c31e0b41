"""Memory, disk and time of a run, from the base's config alone: no weight is loaded.

The model is built on the `meta` device, where parameters have shapes and dtypes but no values. The run's back end
attaches the adapter, Transformers' quantiser says which weights are stored in 4 or 8 bits, the optimizer's own code
makes its state, and `plainlora.resources.activations` runs the step.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from plainlora.backends import count_parameters
from plainlora.resources.devices import Devices
from plainlora.resources.disk import DiskNeed, count_disk
from plainlora.resources.duration import TimeNeed, count_time
from plainlora.resources.engines import DevicesNeed, count_engines
from plainlora.resources.model_states import count_model_states
from plainlora.resources.peak import MemoryNeed, count_memory
from plainlora.resources.plan import Plan
from plainlora.settings.arguments import optim_name

ADAPTER_PARTS = ("lora_A", "lora_B", "base_layer", "original_module", "trained_module", "modules_to_save")


@dataclass(frozen=True)
class Target:
    """The parameters of all target modules of one name.

    Attributes:
        total: Number of parameters, including the adapters'.
        trainable: Number of trained ones among them.
    """

    total: int
    trainable: int


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        total: Number of parameters of the model with its adapter.
        trainable: Number of trained ones among them.
        targets: The counts by the last part of the modules' names.
    """

    total: int
    trainable: int
    targets: dict[str, Target]


@dataclass(frozen=True)
class Footprint:
    """What a run needs.

    Attributes:
        device: The device that trains.
        optim: The optimizer's name.
        parameters: The numbers of parameters.
        memory: Memory of the device.
        disk: Disk space of `output_dir`.
        time: A lower bound of the duration.
        devices: The needs on several devices, if these were asked for.
    """

    device: str
    optim: str
    parameters: Parameters
    memory: MemoryNeed
    disk: DiskNeed
    time: TimeNeed
    devices: DevicesNeed | None = None

    def to_dict(self) -> dict[str, Any]:
        """The footprint as a dictionary, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A table for a terminal."""
        rows = [*self._parameter_rows(), *self._memory_rows()]
        if self.devices is None:
            rows += [*self._peak_rows(), ("disk", self._disk()), ("time", self._time())]
        else:
            rows.append(
                ("disk", self._disk())
            )  # this machine's memory and speed say nothing about the planned devices
        return [f"{name:<12}{text}" for name, text in rows if text]

    def _parameter_rows(self) -> list[tuple[str, str]]:
        total, trainable = self.parameters.total, self.parameters.trainable
        targets = self.parameters.targets.items()
        names = ", ".join(f"{name} {target.trainable:,}" for name, target in targets if target.trainable)
        return [("parameters", f"{trainable:,} of {total:,} are trained ({trainable / total:.2%})"), ("", names)]

    def _memory_rows(self) -> list[tuple[str, str]]:
        memory = self.memory
        formats = ", ".join(f"{name} {format_size(size)}" for name, size in memory.weights_by_format.items())
        kept, again = format_size(memory.activations), format_size(memory.activations_checkpointed)
        head = "" if memory.loss_head is None else f"; the loss alone {format_size(memory.loss_head)}"
        return [
            ("weights", f"{format_size(memory.weights)} ({formats})"),
            ("trained", f"adapter {format_size(memory.adapters)}, gradients {format_size(memory.gradients)}, "
                        f"{self.optim} {format_size(memory.optimizer)}"),
            ("activations", f"{kept}, {again} with gradient checkpointing{head}"),
        ]  # fmt: skip

    def _peak_rows(self) -> list[tuple[str, str]]:
        memory = self.memory
        named = {"libraries and rows": memory.libraries, "pages of the checkpoint": memory.mapped}
        parts = [f"{name} {format_size(size)}" for name, size in named.items() if size]
        rest = ", ".join([*parts, f"margin {format_size(memory.margin)}"])
        how = "with" if memory.checkpointing else "without"
        verdict = {True: "fits", False: "DOES NOT FIT", None: "unknown whether it fits"}[memory.fits]
        free = "an unknown amount" if memory.free is None else format_size(memory.free)
        peak = f"at least {format_size(memory.at_least)}" if memory.peak is None else format_size(memory.peak)
        text = f"{peak} {how} gradient checkpointing, {free} free on {self.device}: {verdict}"
        return [("other", rest), ("peak", text)]

    def _disk(self) -> str:
        disk = self.disk
        return (
            f"{format_size(disk.needed)} ({disk.checkpoints} x {format_size(disk.checkpoint)} checkpoint, "
            f"result {format_size(disk.result)}, merged {format_size(disk.merged)}), {format_size(disk.free)} free: "
            f"{'fits' if disk.fits else 'DOES NOT FIT'}"
        )

    def _time(self) -> str:
        time = self.time
        return (
            f"at least {_duration(time.seconds_at_least)}: {time.steps:,} steps, {time.tokens:,} tokens, "
            f"{time.flops:.1e} FLOPs at {time.flops_per_second / 1e9:,.0f} GFLOP/s"
        )


def format_size(size: int | None) -> str:
    """A number of bytes as text: `1.2 GB`, `3.4 MB`."""
    if size is None:
        return "unknown"
    return f"{size / 1e9:.1f} GB" if size >= 5e7 or not size else f"{size / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


def _target_of(name: str) -> tuple[str, bool]:
    """The last part of the name of a parameter's module, and whether an adapter wraps that module."""
    parts = name.split(".")
    marked = next((at for at, part in enumerate(parts) if part in ADAPTER_PARTS), None)
    owner = parts[:-1] if marked is None else parts[:marked]
    return (owner[-1] if owner else name), marked is not None


def count_targets(model: nn.Module) -> dict[str, Target]:
    """Parameters of the modules that are trained or carry an adapter, by the last part of the modules' names.

    Args:
        model: The model with its adapter, of any back end, on any device.
    """
    found: dict[str, Target] = {}
    for name, parameter in model.named_parameters():
        target, wrapped = _target_of(name)
        if wrapped or parameter.requires_grad:
            old = found.get(target, Target(0, 0))
            trainable = parameter.numel() if parameter.requires_grad else 0
            found[target] = Target(old.total + parameter.numel(), old.trainable + trainable)
    return dict(sorted(found.items()))


def estimate(plan: Plan, devices: Devices | None = None) -> Footprint:
    """Estimates the memory, disk space and time that a run will need. No weight is loaded.

    Args:
        plan: The run.
        devices: The devices that the run is planned for, if it is not one process here.

    Raises:
        UserError: The optimizer cannot be made here, or the adapter does not fit the model.
        LoRAError: The adapter does not fit the model.
    """
    base, model = plan.build()
    states = count_model_states(plan, base, model)
    memory = count_memory(plan, base, model, states)
    trainable, total = count_parameters(model)
    return Footprint(
        device=str(plan.device),
        optim=optim_name(plan.training),
        parameters=Parameters(total, trainable, count_targets(model)),
        memory=memory,
        disk=count_disk(plan, base, model, memory.optimizer),
        time=count_time(plan, model, memory.checkpointing),
        devices=None if devices is None else count_engines(plan, base, model, states, memory, devices),
    )
