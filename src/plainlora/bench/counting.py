"""What does not vary from run to run: bytes kept for the way back, operations, floating-point operations."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class _OperationCounter(TorchDispatchMode):
    """Counts what reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count(forward: Callable[[], torch.Tensor], weights: Iterable[torch.Tensor]) -> dict[str, int]:
    """Counts one forward and backward pass.

    Args:
        forward: The pass; its output is summed and taken back.
        weights: Tensors that are there anyway, and are not counted as kept.

    Returns:
        `saved bytes`, of distinct storages that autograd keeps between the passes; `operations`, without views;
        `FLOPs`, of matrix products.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in weights}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    operations, flops = _OperationCounter(), FlopCounterMode(display=False)
    with flops, operations:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()
        output.backward(torch.ones_like(output))
    return {"saved bytes": sum(kept.values()), "operations": operations.count, "FLOPs": flops.get_total_flops()}
