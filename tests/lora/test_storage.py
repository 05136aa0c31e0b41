"""How base weights are stored: whole, transposed, or in bitsandbytes' 4 and 8 bits."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from plainlora.lora import storage
from plainlora.lora.errors import LoRAError
from plainlora.lora.record import lora_layers
from tests.conftest import load_quantized, make_model, random_ids
from tests.lora.oracle import assert_equal_tensors, by_peft, by_us, logits, move, snapshot, trainable

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZED = {
    "nf4": NF4,
    "nf4 double": NF4 | {"bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
quantized = pytest.mark.parametrize("how", QUANTIZED)
OPTIONS = {"r": 6, "lora_alpha": 16, "target_modules": "all-linear"}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@quantized
def test_a_quantised_base_computes_and_trains_as_peft_s(how: str, model_dirs: dict[str, Path]) -> None:
    ours = by_us(load_quantized(model_dirs["llama"], **QUANTIZED[how]), **OPTIONS)
    theirs = by_peft(load_quantized(model_dirs["llama"], **QUANTIZED[how]), **OPTIONS)
    assert all(storage.is_quantized(layer.base_layer) for _, layer in lora_layers(ours))
    assert_equal_tensors(trainable(ours), trainable(theirs))
    assert {matrix.dtype for matrix in trainable(ours).values()} == {torch.float32}
    start = logits(ours)
    move(ours, theirs)
    assert relative(logits(ours), logits(theirs)) < 1e-6
    assert relative(start, logits(theirs)) > 1e-2
    for model in (ours, theirs):
        model(input_ids=random_ids(), labels=random_ids()).loss.backward()
    expected = trainable(theirs)
    for name, matrix in trainable(ours).items():
        assert relative(matrix.grad, expected[name].grad) < 1e-6, name


@quantized
def test_training_and_evaluating_leave_the_quantised_bytes_alone(how: str, model_dirs: dict[str, Path]) -> None:
    model = by_us(load_quantized(model_dirs["llama"], **QUANTIZED[how]), **OPTIONS)
    before = snapshot(model)
    packed = [layer.weight.data.clone() for _, layer in lora_layers(model)]
    assert {weight.dtype for weight in packed} <= {torch.uint8, torch.int8}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    history = []
    for _ in range(4):
        loss = model.train()(input_ids=random_ids(), labels=random_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        logits(model.eval())
    assert history[-1] < history[0]
    for (name, layer), weight in zip(lora_layers(model), packed, strict=True):
        assert torch.equal(layer.weight.data, weight), name
    after = snapshot(model)
    assert_equal_tensors(
        {name: tensor for name, tensor in after.items() if ".lora_" not in name},
        {name: tensor for name, tensor in before.items() if ".lora_" not in name},
    )
    assert any(not torch.equal(after[name], before[name]) for name in after if ".lora_" in name)


@quantized
def test_u1_a_quantised_weight_takes_no_delta(how: str, model_dirs: dict[str, Path]) -> None:
    model = load_quantized(model_dirs["llama"], **QUANTIZED[how])
    layer = model.model.layers[0].self_attn.q_proj
    assert storage.is_quantized(layer)
    assert storage.is_supported(layer)
    assert storage.features(layer) == (64, 64)
    with pytest.raises(LoRAError, match="quantised"):
        storage.merged_weight(layer, torch.ones(64, 64))


def test_features_are_in_then_out() -> None:
    model = make_model("gpt2")
    assert storage.features(nn.Linear(3, 5)) == (3, 5)
    assert storage.features(Conv1D(5, 3)) == (3, 5)
    assert storage.features(model.transformer.h[0].mlp.c_fc) == (64, 256)


@pytest.mark.parametrize(
    ("module", "supported", "transposed"),
    [
        (nn.Linear(3, 5), True, False),
        (Conv1D(5, 3), True, True),
        (nn.Embedding(3, 5), False, False),
        (nn.Conv1d(3, 5, 1), False, False),
        (nn.LayerNorm(3), False, False),
    ],
)
def test_linear_layers_are_supported(module: nn.Module, supported: bool, transposed: bool) -> None:
    assert storage.is_supported(module) == supported
    assert storage.is_conv1d(module) == transposed
    assert not storage.is_quantized(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [nn.Linear(6, 10), Conv1D(10, 6)])
def test_u13_the_sum_is_rounded_once(module: nn.Module, dtype: torch.dtype) -> None:
    module = module.to(dtype)
    delta = torch.randn(10, 6)
    exact = module.weight.double() + (delta.T if isinstance(module, Conv1D) else delta).double()
    merged = storage.merged_weight(module, delta)
    assert merged.dtype == dtype
    assert merged.shape == module.weight.shape
    error = (merged.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)).all()


def test_a_sum_that_overflows_is_refused() -> None:
    module = nn.Linear(4, 4).half()
    with pytest.raises(LoRAError, match=r"not finite in torch\.float16"):
        storage.merged_weight(module, torch.full((4, 4), 1e6))
    assert torch.isfinite(module.weight).all()
