"""SwiGLU (Shazeer 2020, arXiv:2002.05202, section 2) that keeps only its two inputs for the backward pass.

    y = silu(g) * u          silu(g) = g sigmoid(g)

    dg = dy u sigmoid(g) (1 + g (1 - sigmoid(g)))          du = dy silu(g)

Computed as two operations, silu and a product, autograd would also keep silu(g), which is as large as either input.
"""

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = gradients
        return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`.

    Args:
        gate: Any shape.
        up: The same shape and dtype.
    """
    return cast(torch.Tensor, _SwiGLU.apply(gate, up))
