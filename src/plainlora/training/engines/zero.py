"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): stage 2 and stage 3.

Stage 2 shards gradients and the optimizer's state, stage 3 the weights too, the adapter's among them. Weights are
gathered where they are needed. The optimizer works on flat fp32 copies of the trained weights, of which each process
has a part; DeepSpeed's `safe_get_full_...` functions make them whole:
https://deepspeed.readthedocs.io/en/latest/zero3.html#debugging
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers.trainer as upstream
from peft.tuners.lora import LoraLayer
from torch import nn

from plainlora.lora.layer import LoRALinear
from plainlora.training.engines.engine import Engine, count_of


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


class ZeRO(Engine):
    """ZeRO-2, or ZeRO-3, which shards the weights too."""

    name = "DeepSpeed ZeRO"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.shards_base = trainer.accelerator.state.deepspeed_plugin.zero_stage == 3

    def after_wrapping(self, model: nn.Module) -> None:
        """Registers the weights that a LoRA layer reads in its backward pass."""
        if self.shards_base:
            register_weights(model)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter], changed: bool = False) -> Iterator[None]:
        """Gathers the weights under ZeRO-3. Changed weights are copied to the optimizer's fp32 copies afterwards."""
        import deepspeed  # noqa: PLC0415  an extra

        gathered, rank = list(parameters) if self.shards_base else [], 0 if changed else None
        with deepspeed.zero.GatheredParameters(gathered, modifier_rank=rank, enabled=self.shards_base):
            yield
        if changed:
            self._zero.refresh_fp32_params()

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which holds PyTorch's."""
        engine: Any = self.trainer.model_wrapped
        return engine.optimizer

    def optimizer_state(self) -> dict[str, Any]:
        """The whole state: that of each weight gathered, and what is no tensor of its size, the step, as it is.

        A weight that is not fp32 has its fp32 copy under `master`.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: PLC0415

        inner = self._zero.optimizer
        flat, held = next(iter(inner.state.items()), (torch.empty(0), {}))
        sized = [key for key, value in held.items() if torch.is_tensor(value) and value.shape == flat.shape]
        state: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(self.trained):
            found = {key: safe_get_full_optimizer_state(parameter, key) for key in sized}
            if parameter.dtype != torch.float32:
                found["master"] = safe_get_full_fp32_param(parameter)
            whole = {key: value.reshape(_shape_of(parameter)).cpu() for key, value in found.items()}
            # Copied, because every weight counts its own steps, and torch.save keeps what is shared.
            state[number] = {key: copy.deepcopy(held[key]) for key in held if key not in sized} | whole
        numbers = iter(range(len(state)))
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": [next(numbers) for _ in own]}
            for group, own in zip(inner.param_groups, self.groups, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Loads what `optimizer_state` returned, in a run of any number of processes."""
        inner, parts = self._zero.optimizer, self._parts()
        if len(state["state"]) != len(parts):
            raise ValueError(f"it has {len(state['state'])} weights, and the run {len(parts)}")
        for (parameter, flat, start, own), saved in zip(parts, state["state"].values(), strict=True):
            held = inner.state[flat]
            for key, value in saved.items():
                if torch.is_tensor(value) and value.numel() == count_of(parameter) and value.ndim:
                    into = flat if key == "master" else held.setdefault(key, torch.zeros_like(flat))
                    part = value.flatten()[own]
                    into.data[start : start + len(part)].copy_(part)
                else:
                    held[key] = value
        for group, saved in zip(inner.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def _parts(self) -> list[tuple[nn.Parameter, torch.Tensor, int, slice]]:
        """Of each trained weight: the flat fp32 tensor with this process's part, where it starts, what it is of."""
        zero, found = self._zero, []
        for number, parameter in ((at, each) for at, group in enumerate(self.groups) for each in group):
            if self.shards_base:
                subgroup, start, size = zero.grad_position[zero.get_param_id(parameter)]
                flat, first = zero.fp32_partitioned_groups_flat[subgroup], size * torch.distributed.get_rank()
            else:
                flat, mapping = zero.single_partition_of_fp32_groups[number], cast(Any, parameter)._hp_mapping
                start = size = first = 0
                if mapping is not None:  # else other processes have all of it
                    start, size = mapping.hp_fragment_address.start, mapping.lp_fragment_address.numel
                    first = mapping.lp_fragment_address.start
            found.append((parameter, flat, start, slice(first, first + size)))
        return found


def _shape_of(parameter: torch.Tensor) -> torch.Size:
    return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))
