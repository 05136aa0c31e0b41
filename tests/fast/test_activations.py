"""SwiGLU in one Function beside the same in two operations."""

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional

from benchmarks.counting import count
from plainlora import inject
from plainlora.fast.activations import swiglu
from plainlora.fast.fuse import unfuse
from tests.conftest import fused_in_place, make_model, random_ids


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_value_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, 64, dtype=dtype, requires_grad=True) for _ in range(2))
    upstream = torch.randn(3, 5, 64, dtype=dtype)
    found, expected = swiglu(gate, up), functional.silu(gate) * up
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found, (gate, up), upstream)),
        (expected, *torch.autograd.grad(expected, (gate, up), upstream)),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= tolerance


def test_a_backward_pass_inside_autocast_gives_the_same_gradients() -> None:
    gate, up = (torch.randn(3, 64, requires_grad=True) for _ in range(2))
    found = []
    for inside in (False, True):
        y = swiglu(gate, up)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(y, (gate, up), y.detach().sin()))
    assert all(torch.equal(outside, within) for outside, within in zip(*found, strict=True))


def test_the_two_inputs_alone_are_kept() -> None:
    gate, up = (torch.randn(16, 64, requires_grad=True) for _ in range(2))
    assert count(lambda: swiglu(gate, up), [])["saved bytes"] == 2 * 16 * 64 * 4
    assert count(lambda: functional.silu(gate) * up, [])["saved bytes"] == 3 * 16 * 64 * 4


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_keeps_one_tensor_of_the_mlps_width_less_a_block(kind: str) -> None:
    ids = random_ids()
    kept, logits = [], []
    model = fused_in_place(inject(make_model(kind), LoraConfig(target_modules=["q_proj"])))
    for step in (lambda: None, lambda: unfuse(model)):
        step()
        kept.append(count(lambda: model(input_ids=ids).logits[0], model.parameters())["saved bytes"])
        logits.append(model(input_ids=ids).logits)
    saved = model.config.num_hidden_layers * ids.numel() * model.config.intermediate_size * 4
    assert kept[1] - kept[0] >= saved
    torch.testing.assert_close(*logits)
    assert not any("forward" in vars(module) for module in model.modules())
