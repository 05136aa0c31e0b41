"""The LoRA layer of `lora/layer.py` as one autograd Function: less time, less memory, the same result up to rounding.

    h = W0 x + b + s B A (m * x)              s = scaling / (1 - p), m the dropout's mask, all ones without dropout

    g  = dh B                                 (N, r)
    dB = s dh^T (m * x) A^T                   (d_out, r)
    dA = s g^T (m * x)                        (r, d_in)
    dx = dh W0 + m * (s g A)                  (N, d_in)

The reference form allocates four outputs, sums two input gradients, and saves a dropped copy of x with an fp32 mask.
Here the low-rank product is accumulated into the base's own output (`addmm_`), the scaling is applied at rank r, and
one input gradient is accumulated in place. Only x, the rank-r activation and a boolean mask are saved.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from plainlora.lora import storage


class Dropped(NamedTuple):
    """`dropout(x) = kept / divisor`.

    Attributes:
        kept: `(..., d_in)`, in x's dtype.
        mask: Which elements of x are kept, as booleans; `None` for all.
        divisor: By which `kept` is still to be divided (dimensionless).
    """

    kept: torch.Tensor
    mask: torch.Tensor | None
    divisor: float


def drop(x: torch.Tensor, p: float, dtype: torch.dtype) -> Dropped:
    """`nn.Dropout(p)` of x, with the same random numbers.

    Args:
        x: `(..., d_in)`.
        p: Probability of dropping an element, in [0, 1).
        dtype: The dtype in which PEFT applies the dropout. On a CPU the mask does not depend on it.
    """
    if p == 0:
        return Dropped(x, None, 1.0)
    if x.device.type == "cuda":
        return drop_in_one_kernel(x, p, dtype)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    # A product with bytes; with booleans PyTorch would first copy the mask in x's dtype.
    return Dropped(x * mask.view(torch.uint8), mask, 1 - p)


def drop_in_one_kernel(x: torch.Tensor, p: float, dtype: torch.dtype) -> Dropped:
    """As `drop`, for p > 0, by CUDA's own kernel, which has divided by 1 - p already."""
    dropped, mask = torch.native_dropout(x.to(dtype), p, True)
    return Dropped(dropped.to(x.dtype), mask, 1.0)


class _LowRankSum(torch.autograd.Function):
    """`x, b, A, B -> W0 x + b + s B A (m * x)`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        base: nn.Module,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        """`(..., d_in) -> (..., d_out)`."""
        h = base(x)  # (..., d_out)
        kept, mask, divisor = drop(x, p, storage.storage_of(base).dropped_dtype(x, lora_a.dtype))
        down = kept.reshape(-1, x.shape[-1]) @ lora_a.to(x.dtype).T  # (N, r)
        h.view(-1, h.shape[-1]).addmm_(down.to(h.dtype), lora_b.to(h.dtype).T, alpha=scaling / divisor)
        ctx.save_for_backward(x, down, lora_a, lora_b, mask)
        ctx.base, ctx.scaling, ctx.scaling_of_down = base, scaling / (1 - p), scaling / divisor
        return h.detach()  # not a view, so that a model's code may change it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, the bias, A and B, in dtypes set here: autocast is switched off."""
        with torch.autocast(gradients[0].device.type, enabled=False):
            return *_gradients(ctx, gradients[0].reshape(-1, gradients[0].shape[-1])), None, None, None


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, the bias, A and B, from that of h, `(N, d_out)`."""
    x, down, lora_a, lora_b, mask = ctx.saved_tensors
    needs_x, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    through_b = (grad @ lora_b.to(grad.dtype)).mul_(ctx.scaling)  # (N, r)
    grad_x = grad_a = grad_b = grad_bias = None
    if needs_b:
        # Transposed twice: (r, N) (N, d_out) takes half the time of (d_out, N) (N, r) on a CPU.
        grad_b = ((down.to(grad.dtype) * ctx.scaling_of_down).T @ grad).T.to(lora_b.dtype)
    if needs_bias:
        grad_bias = grad.sum(0)
    kept = x.reshape(-1, x.shape[-1]).to(grad.dtype)  # (N, d_in)
    if mask is not None:
        # 0 and 1, for both products below. From bytes, because from booleans it takes a CPU eight times as long.
        weights = mask.view(torch.uint8).reshape(kept.shape).to(grad.dtype)
        kept = kept * weights
    if needs_a:
        grad_a = (through_b.T @ kept).to(lora_a.dtype)
    if needs_x:
        grad_x = grad @ storage.dense_weight(ctx.base, grad.dtype)  # (N, d_in)
        if mask is None:
            grad_x.addmm_(through_b, lora_a.to(grad.dtype))
        else:
            through_a = torch.mm(through_b, lora_a.to(grad.dtype), out=kept)  # `kept` is no longer needed
            grad_x.addcmul_(through_a, weights)
        grad_x = grad_x.view(x.shape)
    return grad_x, grad_bias, grad_a, grad_b


def fused_forward(
    base: nn.Module,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    p: float = 0.0,
) -> torch.Tensor:
    """`W0 x + b + scaling * B A dropout(x)`, shape `(..., d_out)`, in the base's dtype.

    Args:
        base: A frozen layer that `storage.is_fusable`.
        x: `(..., d_in)`.
        lora_a: `(r, d_in)`.
        lora_b: `(d_out, r)`.
        scaling: alpha / r (dimensionless).
        p: Probability of dropping an element of the adapter's input; 0 outside training.
    """
    bias = cast(torch.Tensor | None, base.bias)
    return cast(torch.Tensor, _LowRankSum.apply(x, bias, lora_a, lora_b, base, scaling, p))
