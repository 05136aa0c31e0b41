"""Attention with dropout on its probabilities, in blocks that fit into a CPU's cache.

    P = softmax(s Q K^T + mask)          O = (M * P) V / (1 - p)          M the dropout's mask, s the scale

    dP = M * (dO V^T) / (1 - p)          dV = (M * P)^T dO / (1 - p)
    dS = P * (dP - rowsum(dP * P))       dQ = s dS K          dK = s dS^T Q

With dropout, `scaled_dot_product_attention` on a CPU makes every factor of these products for all heads at once, and
keeps P, M * P and an fp32 mask for the backward pass: 12 bytes for each query, key and head. Here only M is kept, one
byte each, and P is computed again for some queries at a time, with only the keys that at least one of them sees.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 18  # scores of a block: 1 MB in fp32, as much as one core's second-level cache holds

At = tuple[int, slice, slice]  # a row, some of its heads, and some of its queries or keys


class _Blocks:
    """The blocks of one call, and buffers that all of them use: allocating new pages would cost more than computing.

    Args:
        query: `(B, H, Lq, D)`.
        key: `(B, H, Lk, D)`.
        mask: `(B or 1, 1, Lq or 1, Lk)`; `None` for all.
        keep: `(B, H, Lq, Lk)`: which probabilities are not dropped.
        scale: Of the scores (dimensionless).
        buffers: How many blocks are in use at a time.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        keep: torch.Tensor,
        scale: float,
        buffers: int,
    ) -> None:
        self.query, self.key, self.mask, self.keep, self.scale = query, key, mask, keep, scale
        (_, heads, queries, _), keys = query.shape, key.shape[2]
        self.heads = min(heads, max(1, BLOCK // (queries * keys)))
        self.queries = min(queries, max(1, BLOCK // (self.heads * keys)))
        self.bias = None if mask is None else query.new_zeros(mask.shape).masked_fill_(~mask, -math.inf)
        self.buffers = query.new_empty(buffers, self.heads * self.queries * keys)

    def __iter__(self) -> Iterator[tuple[At, At, list[torch.Tensor]]]:
        """Yields, for each block, where its queries are, where the keys that they see are, and its buffers."""
        (rows, heads, queries, _), keys = self.query.shape, self.key.shape[2]
        for row in range(rows):
            for start in range(0, queries, self.queries):
                chosen = slice(start, min(start + self.queries, queries))
                seen = slice(0, keys) if self.mask is None else _span(_part(self.mask, row, chosen).any(0))
                for head in range(0, heads, self.heads):
                    some = slice(head, min(head + self.heads, heads))
                    shape = (some.stop - some.start, chosen.stop - chosen.start, seen.stop - seen.start)
                    memory = self.buffers[:, : math.prod(shape)].view(-1, *shape)
                    yield (row, some, chosen), (row, some, seen), list(memory)

    def probabilities(self, at: At, keys_at: At, out: torch.Tensor) -> torch.Tensor:
        """P of a block, `(heads, queries, keys)`."""
        bias = out if self.bias is None else _part(self.bias, at[0], at[2])[:, keys_at[2]]
        beta = int(self.bias is not None)
        torch.baddbmm(bias, self.query[at], self.key[keys_at].mT, beta=beta, alpha=self.scale, out=out)
        return torch.softmax(out, -1, out=out)

    def kept(self, at: At, keys_at: At, out: torch.Tensor) -> torch.Tensor:
        """M of a block as numbers. Read as bytes: booleans would take eight times as long."""
        return out.copy_(self.keep[at][..., keys_at[2]].view(torch.uint8))


def _part(mask: torch.Tensor, row: int, chosen: slice) -> torch.Tensor:
    """The part of a mask `(B or 1, 1, Lq or 1, Lk)` for some queries of a row, `(queries or 1, Lk)`."""
    own = mask[row if mask.shape[0] > 1 else 0, 0]
    return own[chosen] if own.shape[0] > 1 else own


def _span(seen: torch.Tensor) -> slice:
    """From the first key that is seen to the last; all keys under FakeTensorMode, where the mask has no values."""
    if isinstance(seen, FakeTensor):
        return slice(0, len(seen))
    places = seen.nonzero()
    return slice(int(places[0]), int(places[-1]) + 1)


class _DropoutAttention(torch.autograd.Function):
    """`Q, K, V -> O`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        p: float,
        scale: float,
    ) -> torch.Tensor:
        """`(B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D) -> (B, H, Lq, D)`."""
        rows, heads, queries, _ = query.shape
        # For all blocks at once, in the order in which dropout would draw it.
        keep = query.new_empty((rows, heads, queries, key.shape[2]), dtype=torch.bool).bernoulli_(1 - p)
        if mask is not None:
            # A query that sees no key gets the output 0: it is treated as if it saw all keys and all were dropped.
            sees = mask.any(-1, keepdim=True)
            keep, mask = keep.logical_and_(sees), mask | ~sees
        ctx.save_for_backward(query, key, value, mask, keep)
        ctx.p, ctx.scale, ctx.dtype = p, scale, _dtype_of_sums(query.dtype)
        q, k, v = (each.to(ctx.dtype) for each in (query, key, value))
        out = q.new_empty((rows, queries, heads, value.shape[3])).transpose(1, 2)
        blocks = _Blocks(q, k, mask, keep, scale, buffers=2)
        for at, keys_at, (first, second) in blocks:
            dropped = blocks.probabilities(at, keys_at, first).mul_(blocks.kept(at, keys_at, second))
            torch.baddbmm(out[at], dropped, v[keys_at], beta=0, alpha=1 / (1 - p), out=out[at])
        return out.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of Q, K and V."""
        with torch.autocast("cpu", enabled=False):
            return *_gradients(ctx, gradients[0]), None, None, None


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of Q, K and V from that of O, `(B, H, Lq, D)`."""
    query, key, value, mask, keep = ctx.saved_tensors
    q, k, v, grad = (each.to(ctx.dtype) for each in (query, key, value, grad))
    rest = 1 / (1 - ctx.p)
    # In the memory layout of the model's projections, (B, L, H, D).
    grad_q, grad_k, grad_v = (torch.zeros_like(each.transpose(1, 2)).transpose(1, 2) for each in (q, k, v))
    blocks = _Blocks(q, k, mask, keep, ctx.scale, buffers=3)
    for at, keys_at, (first, second, third) in blocks:
        probabilities, kept = blocks.probabilities(at, keys_at, first), blocks.kept(at, keys_at, second)
        dropped = torch.mul(probabilities, kept, out=third)
        grad_v[keys_at].baddbmm_(dropped.mT, grad[at], alpha=rest)
        block = torch.baddbmm(third, grad[at], v[keys_at].mT, beta=0, alpha=rest, out=third).mul_(kept)
        torch.ops.aten._softmax_backward_data(block, probabilities, -1, ctx.dtype, grad_input=block)
        grad_q[at].baddbmm_(block, k[keys_at], beta=0, alpha=ctx.scale)
        grad_k[keys_at].baddbmm_(block.mT, q[at], alpha=ctx.scale)
    return grad_q.to(query.dtype), grad_k.to(key.dtype), grad_v.to(value.dtype)


def _dtype_of_sums(dtype: torch.dtype) -> torch.dtype:
    """As `scaled_dot_product_attention`: in half precision it computes in fp32."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def dropout_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    p: float,
    scale: float | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """What `scaled_dot_product_attention` computes on a CPU with dropout, with the same random numbers.

    Args:
        query: `(B, H, Lq, D)`.
        key: `(B, H or a divisor of it, Lk, D)`.
        value: As `key`.
        mask: Booleans, `(B or 1, 1, Lq or 1, Lk)`: which keys a query sees; `None` for all. The same for all heads.
        p: Probability of dropping a probability, in (0, 1).
        scale: Of the scores; `None` for `1 / sqrt(D)`.
        is_causal: Whether query i sees only the keys up to i. Not with a mask.

    Returns:
        `(B, H, Lq, D)`, laid out as `(B, Lq, H, D)`.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if is_causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        return cast(torch.Tensor, _DropoutAttention.apply(query, key, value, mask, p, scale))
