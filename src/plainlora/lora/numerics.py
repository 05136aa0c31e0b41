"""Adds a low-rank product to a weight in place, rounded once; and checks for values that are not finite."""

import math
from collections.abc import Iterator

import torch

from plainlora.lora.errors import LoRAError

ROWS = 64  # of a weight, summed at a time where dtypes differ


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    The sum is tried first: it allocates no mask, and if it is finite, so are all values.
    """
    precision = torch.promote_types(tensor.dtype, torch.float32)
    return math.isfinite(tensor.sum(dtype=precision)) or bool(torch.isfinite(tensor).all())


def _in_precision_of_sum(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    precision = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)
    return left.detach().to(precision), right.detach().to(precision)


def _sums(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields `ROWS` rows of the weight at a time, and the same rows of `weight + scaling * left right`, unrounded."""
    for rows, factor in zip(weight.split(ROWS), left.split(ROWS), strict=True):
        yield rows, torch.addmm(rows.to(factor.dtype), factor, right, alpha=scaling)


def check_product(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """Raises `LoRAError` if the sum that `add_product` forms would overflow the weight's dtype.

    No element of the product is larger than

        |scaling| max_i sum_k |left_ik| max_j |right_kj|

    A finite weight cannot overflow by adding less than half a unit in the last place of the dtype's largest number.
    So the weight is read only if the bound exceeds a quarter of that, which leaves room for the bound's own rounding.

    Args:
        weight: `(rows, columns)`.
        left: `(rows, r)`.
        right: `(r, columns)`.
        scaling: Dimensionless.
    """
    left, right = _in_precision_of_sum(weight, left, right)
    largest = torch.finfo(weight.dtype).max
    unit = largest * torch.finfo(weight.dtype).eps / 2
    bound = abs(scaling) * float((left.abs() @ right.abs().amax(1)).amax())
    if bound < unit / 4:
        return
    if not all(is_finite(total.to(weight.dtype)) for _, total in _sums(weight, left, right, scaling)):
        raise LoRAError(f"the merged weight is not finite in {weight.dtype}; merge in a wider dtype")


def add_product(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """`weight <- weight + scaling * left right`, in place and rounded once. Allocates nothing of the weight's size.

    Args:
        weight: `(rows, columns)`, any floating dtype and any strides.
        left: `(rows, r)`, any floating dtype.
        right: `(r, columns)`.
        scaling: Dimensionless.
    """
    left, right = _in_precision_of_sum(weight, left, right)
    if weight.dtype == left.dtype:
        weight.addmm_(left, right, alpha=scaling)
        return
    for rows, total in _sums(weight, left, right, scaling):
        rows.copy_(total)
