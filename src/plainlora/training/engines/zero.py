"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): stage 2 and stage 3.

Stage 2 shards gradients and the optimizer's state, stage 3 the weights too, the adapter's among them. Weights are
gathered where they are needed. The optimizer works on flat fp32 copies of the trained weights, of which each process
has a part. DeepSpeed's `safe_get_full_optimizer_state` makes it whole, but under ZeRO-2 finds that of the first group
of weights alone (`_lazy_init_hp_params_optimizer_state` runs when the first group has stepped):
https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage_1_and_2.py
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers.trainer as upstream
from peft.tuners.lora import LoraLayer
from torch import nn

from plainlora.lora.layer import LoRALinear
from plainlora.training.engines.engine import Engine


@contextmanager
def adapter_loaded_by(load: Callable[[str], None]) -> Iterator[None]:
    """Makes Trainer resume the adapter alone, where it would load DeepSpeed's own files of the whole model.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py (`_prepare_for_training`)

    Args:
        load: Called with the checkpoint's folder.
    """
    own = upstream.deepspeed_load_checkpoint
    upstream.deepspeed_load_checkpoint = lambda engine, checkpoint, **_: load(checkpoint)
    try:
        yield
    finally:
        upstream.deepspeed_load_checkpoint = own


def register_weights(model: nn.Module) -> None:
    """Makes ZeRO-3 gather a LoRA layer's weights for its whole backward pass.

    ZeRO-3 gathers a module's own weights in hooks around its forward and backward pass. `plainlora.fast.lora` reads
    the base's weight, A and B in the backward pass of the layer around them, whose hooks do not know them:
    https://deepspeed.readthedocs.io/en/latest/zero3.html#registering-external-parameters
    """
    import deepspeed  # noqa: PLC0415  an extra

    for layer in model.modules():
        if isinstance(layer, (LoRALinear, LoraLayer)):
            for parameter in layer.parameters():
                deepspeed.zero.register_external_parameter(layer, parameter)


def forget_releases_with_order(zero: Any) -> None:
    """Makes ZeRO-3 decide anew which weights to release, whenever it records anew in which order modules run.

    It caches these decisions for good. Those of a forward pass alone, such as an evaluation before training, release
    weights that the backward pass needs, which are then gathered twice, and with gradient checkpointing three times:
    https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/partitioned_param_coordinator.py
    (`__params_to_release`)

    Args:
        zero: DeepSpeed's optimizer.
    """
    coordinator: Any = zero.parameter_offload.get_param_coordinator()
    decide = type(coordinator)._PartitionedParameterCoordinator__params_to_release  # wraps what it caches, for NVTX
    decisions = next(cell.cell_contents for cell in decide.__closure__ if hasattr(cell.cell_contents, "cache_clear"))
    own = coordinator._invalidate_trace

    def invalidate() -> None:
        own()
        decisions.cache_clear()

    coordinator._invalidate_trace = invalidate


@dataclass(frozen=True)
class Part:
    """The part of a trained weight that this process's optimizer updates.

    Attributes:
        parameter: The weight.
        flat: The optimizer's fp32 tensor, which holds parts of many weights.
        start: Where this part begins in `flat`.
        own: The slice of the flattened weight that this part is. Under ZeRO-3 the last one may reach beyond its end.
    """

    parameter: nn.Parameter
    flat: torch.Tensor
    start: int
    own: slice

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole weight."""
        return cast(torch.Size, getattr(self.parameter, "ds_shape", self.parameter.shape))

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The parts of all processes, from tensors laid out as `flat`, in the weight's shape. To be called by all."""
        whole = values.new_zeros(self.shape.numel())
        into = whole[self.own]
        into.copy_(values.detach()[self.start : self.start + len(into)])
        dist.all_reduce(whole)
        return whole.view(self.shape).cpu()

    def scatter(self, whole: torch.Tensor, values: torch.Tensor) -> None:
        """Copies this process's part of a tensor in the weight's shape into a tensor laid out as `flat`."""
        part = whole.flatten()[self.own]
        values.data[self.start : self.start + len(part)].copy_(part)


class ZeRO(Engine):
    """ZeRO-2, or ZeRO-3, which shards the weights too."""

    name = "DeepSpeed ZeRO"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.shards_base = trainer.accelerator.state.deepspeed_plugin.zero_stage == 3

    def after_wrapping(self, model: nn.Module) -> None:
        """Makes ZeRO-3 gather what a LoRA layer reads in its backward pass, and keep what it can until then."""
        if self.shards_base:
            register_weights(model)
            forget_releases_with_order(self._zero)

    @contextmanager
    def whole(self, changed: bool = False) -> Iterator[None]:
        """Gathers the weights under ZeRO-3. Changed weights are copied to the optimizer's fp32 copies afterwards."""
        import deepspeed  # noqa: PLC0415  an extra

        rank = 0 if changed else None
        with deepspeed.zero.GatheredParameters(self.trained, modifier_rank=rank, enabled=self.shards_base):
            yield
        if changed:
            self._zero.refresh_fp32_params()

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which holds PyTorch's."""
        engine: Any = self.trainer.model_wrapped
        return engine.optimizer

    def optimizer_state(self) -> dict[str, Any]:
        """The whole state. A weight that is not fp32 has its fp32 copy under `master`."""
        inner, parts = self._zero.optimizer, self._parts()
        state: dict[int, dict[str, Any]] = {number: {} for number in range(len(parts))}
        for number, part in enumerate(parts):
            held = dict(inner.state[part.flat])
            if part.parameter.dtype != torch.float32:
                held["master"] = part.flat
            for key, value in held.items():
                sized = torch.is_tensor(value) and value.shape == part.flat.shape
                # Copied, because every weight counts its own steps, and torch.save keeps what is shared.
                state[number][key] = part.gather(value) if sized else copy.deepcopy(value)
        numbers = iter(state)
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": [next(numbers) for _ in own]}
            for group, own in zip(inner.param_groups, self.groups, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Loads what `optimizer_state` returned, in a run of any number of processes."""
        inner, parts = self._zero.optimizer, self._parts()
        if len(state["state"]) != len(parts):
            raise ValueError(f"it has {len(state['state'])} weights, and the run has {len(parts)}")
        for part, saved in zip(parts, state["state"].values(), strict=True):
            held = inner.state[part.flat]
            for key, value in saved.items():
                if torch.is_tensor(value) and value.shape == part.shape:
                    into = part.flat if key == "master" else held.setdefault(key, torch.zeros_like(part.flat))
                    part.scatter(value, into)
                else:
                    held[key] = value
        for group, saved in zip(inner.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def _parts(self) -> list[Part]:
        """The trained weights' parts in this process."""
        zero, found = self._zero, []
        for number, parameter in ((at, each) for at, group in enumerate(self.groups) for each in group):
            if self.shards_base:
                subgroup, start, size = zero.grad_position[zero.get_param_id(parameter)]
                flat, first = zero.fp32_partitioned_groups_flat[subgroup], size * dist.get_rank()
            else:
                flat, mapping = zero.single_partition_of_fp32_groups[number], cast(Any, parameter)._hp_mapping
                start = size = first = 0
                if mapping is not None:  # else other processes have all of it
                    start, size = mapping.hp_fragment_address.start, mapping.lp_fragment_address.numel
                    first = mapping.lp_fragment_address.start
            found.append(Part(parameter, flat, start, slice(first, first + size)))
        return found
