"""The deltas of a saved adapter, read from its files without its base: `s B A` of each module, kept as its factors."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import LoraConfig

from plainlora.lora.config import as_loaded, find_faults, find_unsupported
from plainlora.lora.errors import LoRAError, some
from plainlora.lora.interchange import FLOATS, LORA_WEIGHTS, PREFIX, read_config, read_tensors
from plainlora.lora.layer import scaling_of
from plainlora.lora.numerics import is_finite
from plainlora.lora.targets import value_for

HELD = 0.99  # the share of the squared norm that `used_rank` counts up to
VELORA_INPUTS = ".lora_velora_embed"  # what VeLoRA multiplies inputs by in the backward pass


@dataclass(frozen=True)
class Delta:
    """`s B A`, `(d_out, d_in)`. All that is measured of it is measured in fp64, and the product is never formed.

    Attributes:
        lora_A: `(r, d_in)`.
        lora_B: `(d_out, r)`.
        scaling: s, dimensionless.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def r(self) -> int:
        """The rank of the factors."""
        return self.lora_A.shape[0]

    @cached_property
    def singular_values(self) -> torch.Tensor:
        """The singular values that may differ from 0, largest first, `(min(r, d_out, d_in),)` at most.

        With the QR factors `B = Q R` and `A^T = P S`, `s B A = Q (s R S^T) P^T`: they are those of `s R S^T`, (r, r).
        """
        right = torch.linalg.qr(self.lora_B.double(), mode="r").R  # (min(d_out, r), r)
        left = torch.linalg.qr(self.lora_A.T.double(), mode="r").R  # (min(d_in, r), r)
        return torch.linalg.svdvals(self.scaling * right @ left.T)

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(torch.linalg.vector_norm(self.singular_values))

    @cached_property
    def used_rank(self) -> int:
        """How many of the largest singular values hold 99 % of the squared Frobenius norm; 0 for a delta of zeros."""
        squares = self.singular_values.square()
        return 0 if self.norm == 0 else int((squares.cumsum(0) < HELD * squares.sum()).sum()) + 1

    def cosine(self, other: "Delta") -> float | None:
        """`<D, D'> / (||D|| ||D'||)`, with `<s B A, s' B' A'> = s s' sum((B^T B') * (A A'^T))`; `None` if one is 0."""
        if self.norm == 0 or other.norm == 0:
            return None
        between = (self.lora_B.double().T @ other.lora_B.double()) * (self.lora_A.double() @ other.lora_A.double().T)
        return self.scaling * other.scaling * float(between.sum()) / (self.norm * other.norm)


def concatenate(deltas: Sequence[Delta], weights: Sequence[float], dtype: torch.dtype) -> Delta:
    """`sum_i w_i D_i` as one delta: `B = [B_1 B_2 ...]`, `A = [w_1 s_1 A_1; w_2 s_2 A_2; ...]`, of scaling 1.

    Args:
        deltas: Of one shape.
        weights: One for each, dimensionless.
        dtype: Of the result.
    """
    terms = list(zip(deltas, weights, strict=True))
    return Delta(
        torch.cat([weight * each.scaling * each.lora_A.to(dtype) for each, weight in terms]),
        torch.cat([each.lora_B.to(dtype) for each, _ in terms], dim=1),
        1.0,
    )


def add_factors(deltas: Sequence[Delta], weights: Sequence[float], dtype: torch.dtype) -> Delta:
    """`B = sum_i |w_i s_i|^(1/2) B_i`, `A = sum_i sign(w_i s_i) |w_i s_i|^(1/2) A_i`: PEFT's `linear`, of scaling 1.

    `B A` is not `sum_i w_i D_i`: it also holds the products of each B_i with every other A_j.
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/model.py
    (`_generalized_task_arithmetic_weighted_adapter`)

    Args:
        deltas: Of one shape and one rank.
        weights: One for each, dimensionless.
        dtype: Of the result.
    """
    scales = [weight * each.scaling for each, weight in zip(deltas, weights, strict=True)]
    a = [
        math.copysign(abs(scale) ** 0.5, scale) * each.lora_A.to(dtype)
        for each, scale in zip(deltas, scales, strict=True)
    ]
    b = [abs(scale) ** 0.5 * each.lora_B.to(dtype) for each, scale in zip(deltas, scales, strict=True)]
    return Delta(torch.stack(a).sum(0), torch.stack(b).sum(0), 1.0)


def read_deltas(directory: str | os.PathLike[str]) -> tuple[dict[str, Delta], list[str]]:
    """The delta of each module of a saved adapter, and the names of the other tensors in its file.

    Returns:
        The deltas by the modules' names, layer by layer; and what was trained beside them, such as a bias or a head.

    Raises:
        LoRAError: A file is missing or unreadable, A and B do not fit the config or are not finite, or the adapter is
            of a variant whose delta is no `s B A` of the base's weight.
    """
    config, tensors = as_loaded(read_config(directory)), read_tensors(directory)
    if variants := _beyond_the_product(config):
        raise LoRAError(
            f"{directory} was trained with {some(variants)}, so it may add more than (alpha / r) B A to a layer; "
            "only adapters that do not can be compared and combined"
        )
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(VELORA_INPUTS)}
    for _, fault in find_faults(config):
        raise LoRAError(f"{directory}: {fault}")
    ends = {name.removesuffix(end) for name in tensors for end in LORA_WEIGHTS if name.endswith(end)}
    deltas = {}
    for name in sorted(ends, key=_in_order):
        a, b = (tensors.pop(name + end, torch.empty(0)) for end in LORA_WEIGHTS)
        module = name.removeprefix(PREFIX)
        r = value_for(config.rank_pattern or {}, module, config.r)
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == r:
            raise LoRAError(
                f"{directory}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}, which do not fit its config's "
                f"rank {r}; save the adapter again"
            )
        if a.dtype not in FLOATS or b.dtype not in FLOATS or not (is_finite(a) and is_finite(b)):
            raise LoRAError(
                f"{directory}: A or B of {module} holds values that are not finite numbers; train it again"
            )
        alpha = value_for(config.alpha_pattern or {}, module, config.lora_alpha)
        deltas[module] = Delta(a, b, scaling_of(alpha, r, bool(config.use_rslora)))
    if not deltas:
        raise LoRAError(f"{directory} holds no lora_A and lora_B of a linear layer, so there is nothing to compare")
    return deltas, [name.removeprefix(PREFIX) for name in tensors]


def _beyond_the_product(config: LoraConfig) -> list[str]:
    """The fields that are set, and with which a layer does not add just `s B A`.

    Of PEFT's variants two do: MiCA, whose B is frozen, and VeLoRA, whose backward pass alone differs.
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/variants.py
    """
    found = find_unsupported(config) | ({"use_dora": "use_dora=True"} if config.use_dora else {})
    found.pop("velora_config", None)
    if config.init_lora_weights == "mica":
        del found["init_lora_weights"]
    return list(found.values())


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
