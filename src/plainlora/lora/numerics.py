"""Sums of a weight and a low-rank product, formed in place and rounded once; and what is finite."""

import math
from collections.abc import Iterator

import torch

from plainlora.lora.errors import LoRAError

ROWS = 64  # of a weight, at a time, where a sum cannot be formed in place


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum has finite terms only, and is one read without a mask."""
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
    """`weight + scaling * left right`, `ROWS` rows at a time: those of the weight, and their sum before rounding."""
    for rows, factor in zip(weight.split(ROWS), left.split(ROWS), strict=True):
        yield rows, torch.addmm(rows.to(factor.dtype), factor, right, alpha=scaling)


def check_product(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """Raises `LoRAError` where the sum that `add_product` forms would overflow the weight's dtype.

    No element of the product is larger than

        |scaling| max_i sum_k |left_ik| max_j |right_kj|

    and less than half a unit in the last place of the largest number of the dtype lifts no finite weight beyond that
    number. So the weight need not be read; only where the bound is above a quarter, as it is rounded too, is the sum
    formed.

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
    """`weight <- weight + scaling * left right`, in place, rounded once; nothing of the weight's size is allocated.

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
