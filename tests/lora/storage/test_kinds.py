"""How base weights are stored: whole, transposed, or in bitsandbytes' 4 and 8 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from plainlora.fast import lora as fused
from plainlora.lora import storage
from plainlora.lora.errors import LoRAError
from plainlora.lora.record import lora_layers
from tests.conftest import fused_in_place, load_quantized, make_model, random_ids
from tests.lora.oracle import assert_equal_tensors, by_peft, by_us, logits, move, snapshot, trainable

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZED = {
    "nf4": NF4,
    "nf4 double": NF4 | {"bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": NF4 | {"bnb_4bit_quant_storage": "bfloat16"},  # the container of the bytes, for FSDP2
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
    assert {layer.weight.dtype for _, layer in lora_layers(model)} <= {torch.uint8, torch.int8, torch.bfloat16}
    packed = [layer.weight.data.clone().view(torch.uint8) for _, layer in lora_layers(model)]
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
        assert torch.equal(layer.weight.data.view(torch.uint8), weight), name
    after = snapshot(model)
    frozen = [name for name in before if ".lora_" not in name]
    assert [name for name in after if ".lora_" not in name] == frozen
    for name in frozen:  # as bytes: those of a container in bfloat16 may be NaN
        assert torch.equal(*(each[name].reshape(-1).view(torch.uint8) for each in (after, before))), name
    assert any(not torch.equal(after[name], before[name]) for name in after if ".lora_" in name)


@quantized
def test_u01_a_quantised_weight_takes_no_delta(how: str, model_dirs: dict[str, Path]) -> None:
    model = load_quantized(model_dirs["llama"], **QUANTIZED[how])
    layer = model.model.layers[0].self_attn.q_proj
    assert storage.is_quantized(layer)
    assert storage.is_supported(layer)
    assert storage.storage_of(layer).features(layer) == (64, 64)
    with pytest.raises(LoRAError, match="quantised"):
        storage.storage_of(layer).writable_weight(layer)


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """Autocast of a CPU's kernels, under CUDA's flag, which is all that PEFT looks at, or not."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", device == "cuda")
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=device != "none"):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("device", ["none", "cpu", "cuda"])
@pytest.mark.parametrize("how", [None, "nf4", "int8"])
def test_the_input_is_dropped_in_the_dtype_in_which_peft_drops_it(
    how: str | None, device: str, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the dtype decides which elements are dropped. The input is in half precision, the adapter in fp32."""
    dtypes: list[torch.dtype] = []
    outputs = []
    drop = fused.drop
    monkeypatch.setattr(fused, "drop", lambda x, p, dtype: (dtypes.append(dtype), drop(x, p, dtype))[1])
    for attach in (by_peft, by_us, lambda base, **options: fused_in_place(by_us(base, **options))):
        base = load_quantized(model_dirs["llama"], **QUANTIZED[how]) if how else make_model("llama", torch.bfloat16)
        model: Any = attach(base, **OPTIONS, lora_dropout=0.3).train()
        move(model)
        layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.up_proj"))
        for module in layer.lora_dropout.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
        torch.manual_seed(4)
        with autocast(device):
            outputs.append(layer(torch.randn(5, 64, dtype=torch.bfloat16)))
    as_it_is = how is not None and device == "cuda"
    assert dtypes[0] == (torch.bfloat16 if as_it_is else torch.float32)  # PEFT's
    assert dtypes == dtypes[:1] * 3
    differences = [float((ours - outputs[0]).abs().max() / outputs[0].abs().max()) for ours in outputs[1:]]
    assert differences[0] == 0 or (how is not None and not as_it_is)  # where PEFT rounds the product before the sum
    assert max(differences) < 2e-2


def test_features_are_in_then_out() -> None:
    model = make_model("gpt2")
    for module, expected in (
        (nn.Linear(3, 5), (3, 5)),
        (Conv1D(5, 3), (3, 5)),
        (model.transformer.h[0].mlp.c_fc, (64, 256)),
    ):
        assert storage.storage_of(module).features(module) == expected


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
    found = storage.find_storage(module)
    assert (found is not None and found.transposed) == transposed
    assert not storage.is_quantized(module)
