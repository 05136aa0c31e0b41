"""The layer against PEFT's, to the last bit, and against the from-scratch form, in fp64."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from plainlora.lora.interchange import adapter_state_dict
from plainlora.lora.layer import LoRALinear
from plainlora.lora.record import lora_layers
from tests.conftest import random_ids
from tests.lora.oracle import assert_equal_tensors, by_peft, by_us, logits, make, move, pair, trainable

ARCHITECTURES = {
    "llama": {"target_modules": "all-linear"},
    "qwen2": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "gpt2": {},
    "gpt2 all-linear": {"target_modules": "all-linear"},
}
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def kind_of(architecture: str) -> str:
    return architecture.split(maxsplit=1)[0]


def options_of(architecture: str) -> dict[str, object]:
    return {"r": 6, "lora_alpha": 16, **ARCHITECTURES[architecture]}


def both(architecture: str, dtype: torch.dtype = torch.float32, **options):
    return pair(kind_of(architecture), dtype, **options_of(architecture), **options)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of every trainable parameter, and of the embeddings that enter the first layer."""
    embedded = model.get_input_embeddings()(random_ids()).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=random_ids()).loss.backward()
    return {"embedded": embedded.grad} | {name: parameter.grad for name, parameter in trainable(model).items()}


def losses(model: nn.Module, steps: int = 20) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    torch.manual_seed(3)
    history = []
    for _ in range(steps):
        loss = model(input_ids=random_ids(), labels=random_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


@architectures
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_the_start_is_peft_s(architecture: str, init: bool | str) -> None:
    ours = by_us(make(kind_of(architecture)), **options_of(architecture), init_lora_weights=init)
    drawn = torch.get_rng_state()
    theirs = by_peft(make(kind_of(architecture)), **options_of(architecture), init_lora_weights=init)
    assert_equal_tensors(trainable(ours), trainable(theirs))
    assert torch.equal(drawn, torch.get_rng_state())  # as much, so that what is drawn next is the same too
    noise = [bool(matrix.any()) for name, matrix in trainable(ours).items() if "lora_B" in name]
    assert all(noise) if init is False else not any(noise)


@architectures
def test_u13_logits_and_gradients_are_peft_s(architecture: str) -> None:
    ours, theirs = both(architecture)
    move(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))
    found = gradients(ours)
    assert_equal_tensors(found, gradients(theirs))
    assert all(gradient.any() for gradient in found.values())


@architectures
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_twenty_training_steps_are_peft_s(architecture: str, dropout: float) -> None:
    ours, theirs = both(architecture, lora_dropout=dropout)
    history = losses(ours)
    assert history == losses(theirs)
    assert_equal_tensors(trainable(ours), trainable(theirs))
    assert history[-1] < history[0]


def test_dropout_acts_in_training_only() -> None:
    model = by_us(make("llama"), lora_dropout=0.5)
    move(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_u16_a_half_precision_base_gets_fp32_adapters(dtype: torch.dtype) -> None:
    ours, theirs = both("llama", dtype)
    assert {matrix.dtype for matrix in trainable(ours).values()} == {torch.float32}
    assert_equal_tensors(trainable(ours), trainable(theirs))
    move(ours, theirs)
    assert logits(ours).dtype == dtype
    assert torch.equal(logits(ours), logits(theirs))
    assert_equal_tensors(gradients(ours), gradients(theirs))


@architectures
def test_u16_an_fp64_base_gets_fp64_adapters(architecture: str) -> None:
    ours, theirs = both(architecture, torch.float64)
    assert {matrix.dtype for matrix in trainable(ours).values()} == {torch.float64}
    assert_equal_tensors(trainable(ours), trainable(theirs))
    move(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))
    assert_equal_tensors(gradients(ours), gradients(theirs))


def test_u16_autocast_computes_as_peft_does() -> None:
    ours, theirs = both("llama")
    move(ours, theirs)
    exact = logits(ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(ours), logits(theirs))
        assert not torch.equal(logits(ours).float(), exact)
        found, expected = gradients(ours), gradients(theirs)
    assert_equal_tensors(found, expected)


@architectures
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL calls it by this name still
def test_gradient_checkpointing_changes_no_gradient(architecture: str, use_reentrant: bool) -> None:
    def train(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = both(architecture)[0].train()
        move(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
            assert model.is_gradient_checkpointing
        torch.manual_seed(3)
        model(input_ids=random_ids(), labels=random_ids()).loss.backward()
        return {name: parameter.grad for name, parameter in trainable(model).items()}

    assert_equal_tensors(train(checkpointing=True), train(checkpointing=False))


def base_layer(kind: type[nn.Module], d_in: int, d_out: int) -> nn.Module:
    return (nn.Linear(d_in, d_out) if kind is nn.Linear else Conv1D(d_out, d_in)).double()


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("start", ["randn", "kaiming"])
def test_the_from_scratch_form_maps_into_the_layer(kind: type[nn.Module], start: str) -> None:
    d_in, d_out, r, alpha = 12, 20, 4, 0.7
    base, x = base_layer(kind, d_in, d_out), torch.randn(3, 5, d_in).double()
    if start == "randn":
        a = torch.randn(d_in, r).double() / math.sqrt(r)
    else:
        a = nn.init.kaiming_uniform_(torch.empty(d_in, r).double(), a=math.sqrt(5))
    b = torch.randn(r, d_out).double()

    layer = LoRALinear(base, d_in, d_out, r=r, lora_alpha=alpha * r).double()
    layer.lora_A.weight.data.copy_(a.T)
    layer.lora_B.weight.data.copy_(b.T)

    delta = alpha * (x @ a @ b)
    assert (layer(x) - (base(x) + delta)).abs().max() < 1e-12
    assert delta.abs().max() > 1


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    base, x = base_layer(nn.Linear, 12, 20), torch.randn(3, 12).double()
    layer = LoRALinear(base, 12, 20, r=9, lora_alpha=6, use_rslora=True, init_lora_weights=False).double()
    delta = 6 / math.sqrt(9) * (x @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
    assert (layer(x) - (base(x) + delta)).abs().max() < 1e-12
    assert delta.abs().max() > 0.1


def test_on_the_meta_device_nothing_is_drawn() -> None:
    before = torch.get_rng_state()
    layer = LoRALinear(nn.Linear(4, 6, device="meta"), 4, 6, r=2, lora_alpha=2, device="meta")
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.lora_A.weight.is_meta
    assert layer.lora_B.weight.is_meta
    LoRALinear(layer.base_layer, 4, 6, r=2, lora_alpha=2)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_layer_shows_the_base_s_weight_and_bias() -> None:
    with_bias, without = nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
    assert LoRALinear(with_bias, 4, 6, r=2, lora_alpha=2).weight is with_bias.weight
    assert LoRALinear(with_bias, 4, 6, r=2, lora_alpha=2).bias is with_bias.bias
    assert LoRALinear(without, 4, 6, r=2, lora_alpha=2).bias is None
    assert "d_in=4, d_out=6, r=2, scaling=1" in repr(LoRALinear(without, 4, 6, r=2, lora_alpha=2))


@architectures
def test_the_delta_is_what_the_adapter_adds(architecture: str) -> None:
    model = by_us(make(kind_of(architecture), torch.float64), **options_of(architecture), lora_dropout=0.5).eval()
    move(model)
    for _, layer in lora_layers(model):
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        delta = layer.delta(x)
        assert torch.equal(layer(x), layer.base_layer(x) + delta)
        assert torch.allclose(x @ layer.delta_weight().T, delta, rtol=1e-12)
        assert delta.abs().max() > 0


def test_an_adapters_tensors_are_what_is_trained_and_saved() -> None:
    model = by_us(make("gpt2"), r=6, lora_alpha=16, bias="lora_only", target_modules=["c_attn"])
    state = adapter_state_dict(model)
    for name, layer in lora_layers(model):
        tensors = layer.adapter_tensors()
        assert {key: tuple(value.shape) for key, value in tensors.items()} == {
            "lora_A.weight": (6, 64),
            "lora_B.weight": (192, 6),
        }
        for key, value in tensors.items():
            assert state[f"base_model.model.{name}.{key}"].data_ptr() == value.data_ptr()
