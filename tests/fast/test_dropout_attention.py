"""Attention with dropout, beside `scaled_dot_product_attention` with the same seed."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from plainlora.fast import dropout_attention as module
from plainlora.fast.dropout_attention import dropout_attention

ROWS, HEADS, QUERIES, DIM = 3, 4, 37, 16
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys, values
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def documents(lengths: list[int]) -> torch.Tensor:
    """The mask of a packed row: each token sees its own document up to itself."""
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ((of[:, None] == of) & torch.ones(len(of), len(of), dtype=torch.bool).tril())[None, None]


def padded() -> torch.Tensor:
    mask = torch.ones(ROWS, 1, 1, QUERIES, dtype=torch.bool)
    mask[0, ..., 30:] = mask[2, ..., :5] = False
    return mask


def some_see_nothing() -> torch.Tensor:
    mask = torch.rand(ROWS, 1, QUERIES, QUERIES, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, :, ::7] = False
    return mask


MASKS = {
    "none": lambda: (None, False),
    "causal": lambda: (None, True),
    "padded keys": lambda: (padded(), False),
    "padded keys, a row for each query": lambda: (padded().expand(-1, -1, QUERIES, -1), False),
    "documents": lambda: (documents([9, 20, 8]), False),
    "queries that see no key": lambda: (some_see_nothing(), False),
}


def inputs(dtype: torch.dtype, heads: int = HEADS) -> Inputs:
    """Queries, keys and values as a model's projections lay them out."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((ROWS, QUERIES, each, DIM), dtype=dtype, generator=generator).transpose(1, 2)
        for each in (HEADS, heads, heads)
    )
    return query, key, value


def output_and_gradients(form: Any, given: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    tensors = [tensor.clone().requires_grad_(True) for tensor in given]
    torch.manual_seed(5)
    out = form(*tensors, **options)
    torch.rand(3)  # whatever is drawn between the two passes
    return [out.detach(), *torch.autograd.grad(out, tensors, out.detach().sin())]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).abs().max() / other.abs().max()) <= tolerance


@pytest.mark.parametrize("block", [1 << 18, 3 * QUERIES**2, 5 * QUERIES, 1])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_output_and_gradients_are_those_of_sdpa(
    kind: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)  # all heads of a row, some heads, some queries of one, one query
    mask, is_causal = MASKS[kind]()
    expected = output_and_gradients(
        functional.scaled_dot_product_attention,
        inputs(dtype),
        attn_mask=mask,
        dropout_p=0.3,
        is_causal=is_causal,
        scale=0.2,
    )
    found = output_and_gradients(dropout_attention, inputs(dtype), mask=mask, p=0.3, is_causal=is_causal, scale=0.2)
    assert_close(found, expected, TOLERANCE[dtype])


def test_the_random_stream_goes_on_as_after_sdpa() -> None:
    states = []
    for form in (functional.scaled_dot_product_attention, dropout_attention):
        torch.manual_seed(0)
        form(*inputs(torch.float32), None, 0.1)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_heads_that_share_keys_and_values() -> None:
    expected = output_and_gradients(
        functional.scaled_dot_product_attention, inputs(torch.float64, 2), dropout_p=0.3, enable_gqa=True
    )
    found = output_and_gradients(dropout_attention, inputs(torch.float64, 2), mask=None, p=0.3)
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_fp32_as_by_sdpa(autocast: bool) -> None:
    given = inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = output_and_gradients(functional.scaled_dot_product_attention, given, dropout_p=0.3)
        found = output_and_gradients(dropout_attention, given, mask=None, p=0.3)
    exact = output_and_gradients(
        functional.scaled_dot_product_attention, [tensor.bfloat16().double() for tensor in given], dropout_p=0.3
    )
    for one, other, true in zip(found, expected, exact, strict=True):
        assert one.dtype == other.dtype
        assert (one - true).norm() <= 1.1 * (other - true).norm()


def kept_bytes(mask: torch.Tensor | None) -> int:
    """What one call keeps for its backward pass, beyond queries, keys and values."""
    given = inputs(torch.float32)
    for tensor in given:
        tensor.requires_grad_(True)
    known = {tensor.untyped_storage()._cdata for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage())._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = dropout_attention(*given, mask, 0.1)
    out.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("values", [True, False])
def test_a_byte_is_kept_for_each_score(values: bool) -> None:
    scores = ROWS * HEADS * QUERIES**2
    with nullcontext() if values else FakeTensorMode():
        assert kept_bytes(None) == scores
        assert kept_bytes(torch.ones(1, 1, QUERIES, QUERIES, dtype=torch.bool).tril()) == scores + QUERIES**2


def test_the_output_is_laid_out_for_the_projection_that_follows() -> None:
    assert dropout_attention(*inputs(torch.float32), None, 0.1).transpose(1, 2).is_contiguous()
