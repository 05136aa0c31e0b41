"""FSDP2 (`torch.distributed.fsdp.fully_shard`): the base is sharded, the adapter is in every process.

A base weight is frozen: it is gathered for a block's forward and backward pass, and has no gradient to reduce. The
adapter is a few megabytes. Sharded, each of its matrices would be gathered and its gradient scattered for every
block; in every process it costs one reduction a step, and it is saved, checked and resumed like that of one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from plainlora.errors import UserError
from plainlora.settings.launcher import asks_for_fsdp
from plainlora.training.engines.engine import Engine


@contextmanager
def fsdp_on_cpu(args: Any) -> Iterator[None]:
    """Makes Accelerate use FSDP in processes on a CPU too: by itself it does so only on GPUs and other accelerators.

    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/state.py (`AcceleratorState.__init__`)
    """
    state = PartialState._shared_state
    if not (asks_for_fsdp() or args.fsdp) or state.get("distributed_type") != DistributedType.MULTI_CPU:
        yield
        return
    state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        state["distributed_type"] = DistributedType.MULTI_CPU


class FSDP2(Engine):
    """The base's weights are sharded over processes, the trained weights are whole in every process."""

    name = "FSDP2"
    shards_base = True

    def before_wrapping(self, model: nn.Module) -> None:
        """Keeps the trained weights out of the sharding, the same in every process.

        Raises:
            UserError: A layer has trained and frozen weights, as with `lora_bias`.
        """
        device = self.trainer.args.device
        owners = []
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if any(parameter.requires_grad for parameter in own):
                if not all(parameter.requires_grad for parameter in own):
                    raise UserError(
                        f"FSDP2 cannot train the bias of {name} while its weight is frozen; set lora_bias to none"
                    )
                owners.append(module.to(device))
        for parameter in (each for module in owners for each in module.parameters(recurse=False)):
            dist.broadcast(parameter.data, 0)
        self.trainer.accelerator.state.fsdp_plugin.ignored_modules = owners

    def after_wrapping(self, model: nn.Module) -> None:
        """Gathers the output embedding for the whole forward pass: fused loss heads read its weight, without a call.

        Accelerate puts it in one unit with the final norm, whose call gathers both; a norm that is trained whole, or
        that it does not find, leaves the output embedding alone in its unit.
        """
        head = cast(Any, model).get_output_embeddings()
        if isinstance(head, FSDPModule):

            def gather_head(*_: Any) -> None:
                head.unshard()

            model.register_forward_pre_hook(gather_head)

    def reshard(self, model: nn.Module) -> None:
        """Frees weights that a forward pass without a backward pass has left gathered."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def average_gradients(self) -> None:
        """One reduction for each dtype; a gradient that this process lacks counts as zeros."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = torch.cat([gradient.flatten() for gradient in alike])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            parts = flat.split([gradient.numel() for gradient in alike])
            torch._foreach_copy_(alike, [part.view_as(into) for part, into in zip(parts, alike, strict=True)])
