"""What does not vary from run to run: bytes kept for the backward pass, operations, floating-point operations."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from plainlora.resources.activations import LiveBytes


class _OperationCounter(TorchDispatchMode):
    """Counts what reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _addmm_flop(_: Any, left: torch.Size, right: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of `addmm_` on shapes; PyTorch's own counter knows only the form that makes a new tensor."""
    return 2 * left[0] * left[1] * right[1]


def count(forward: Callable[[], torch.Tensor], weights: Iterable[torch.Tensor]) -> dict[str, int]:
    """Counts one forward and backward pass.

    Args:
        forward: The forward pass; the backward pass starts from its output's sum.
        weights: Tensors that are there anyway, and are not counted as kept.

    Returns:
        `saved bytes`, of distinct storages that autograd keeps between the passes; `tensor bytes`, of all tensors
        that are alive at most; `operations`, without views; `FLOPs`, of matrix products.
    """
    weights = list(weights)
    held = {tensor.untyped_storage().data_ptr() for tensor in weights}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop})
    operations, alive = _OperationCounter(), LiveBytes(weights)
    with flops, operations, alive:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()
        output.backward(torch.ones_like(output))
    return {
        "saved bytes": sum(kept.values()),
        "tensor bytes": alive.peak,
        "operations": operations.count,
        "FLOPs": flops.get_total_flops(),
    }
