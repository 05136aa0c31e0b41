"""DoRA is PEFT's: the start, logits, gradients, files and merge, on every storage."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from plainlora import fuse, inject, load_adapter, merge, save_adapter
from plainlora.lora.dora import DoRALinear
from plainlora.lora.errors import LoRAError
from plainlora.lora.interchange import adapter_state_dict
from plainlora.lora.merge import merge as merge_in_place
from plainlora.lora.record import lora_layers
from tests.conftest import load_quantized, make_model, random_ids

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def moved(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, tensor in sorted(tensors.items()):
            tensor.add_((0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the norms; the absolute difference from zeros."""
    size = theirs.double().norm()
    return float((ours.double() - theirs.double()).norm() / (size if size > 0 else 1.0))


def options_of(dropout: float) -> dict[str, Any]:
    common = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_dora": True}
    return common | {"lora_dropout": dropout}


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=random_ids()).logits


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("kind", "dtype", "within"),
    [
        ("llama", torch.float32, 1e-5),
        ("gpt2", torch.float32, 1e-5),
        ("gpt2", torch.float64, 1e-12),
        ("llama", torch.bfloat16, 1e-2),
    ],
)
def test_it_is_pefts(kind: str, dtype: torch.dtype, within: float, dropout: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = inject(make_model(kind, dtype), LoraConfig(**options_of(dropout)))
    torch.manual_seed(0)
    theirs = get_peft_model(make_model(kind, dtype), LoraConfig(**options_of(dropout)))
    own, expected = adapter_state_dict(ours), get_peft_model_state_dict(theirs)
    assert own.keys() == expected.keys()
    for name, start in own.items():
        assert start.dtype == expected[name].dtype
        assert relative(start, expected[name]) < (1e-6 if dtype == torch.float32 else within), name
    assert sum("lora_magnitude_vector" in name for name in own) == len(own) // 3
    assert relative(logits_of(ours), logits_of(make_model(kind, dtype))) < 1e-6 if dtype != torch.bfloat16 else True

    moved(own)
    moved(expected)  # the model's own tensors
    gradients = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        output = model.train()(input_ids=random_ids(), labels=random_ids())
        output.loss.backward()
        found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        added = r"base_model\.model\.|\.default|\.weight"  # by PEFT
        gradients.append({re.sub(added, "", name): gradient for name, gradient in found.items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == len(own)
    for name, grad in gradients[0].items():
        assert relative(grad, gradients[1][name]) < within * (10 if dtype == torch.bfloat16 else 1), name

    logits = logits_of(ours)
    assert relative(logits, logits_of(theirs)) < within
    assert relative(logits, logits_of(make_model(kind, dtype))) > 1e-2
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    loaded = load_adapter(make_model(kind, dtype), tmp_path / "ours")
    assert torch.equal(logits_of(loaded), logits)
    assert relative(logits_of(load_adapter(make_model(kind, dtype), tmp_path / "theirs")), logits_of(theirs)) < within
    assert relative(logits_of(PeftModel.from_pretrained(make_model(kind, dtype), tmp_path / "ours")), logits) < within
    assert fuse(loaded).unchanged == [name for name, _ in lora_layers(loaded)]
    merged, by_peft = merge(ours), theirs.merge_and_unload()
    assert relative(logits_of(merged), logits) < within * (10 if dtype == torch.bfloat16 else 1)
    for name, weight in merged.state_dict().items():
        assert relative(weight, by_peft.state_dict()[name]) < within or not weight.any(), name


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("storage", [NF4, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_it_is_pefts_on_a_quantised_base(storage: dict[str, Any], model_dirs: dict[str, Path]) -> None:
    """In 8 bits on a CPU PEFT's fails in its second forward pass, as it has lost the scales of the weights by then."""
    torch.manual_seed(0)
    ours = inject(load_quantized(model_dirs["llama"], **storage), LoraConfig(**options_of(0.0)))
    torch.manual_seed(0)
    theirs = get_peft_model(load_quantized(model_dirs["llama"], **storage), LoraConfig(**options_of(0.0)))
    own, expected = adapter_state_dict(ours), get_peft_model_state_dict(theirs)
    assert all(relative(own[name], expected[name]) < 1e-6 for name in own)
    moved(own)
    moved(expected)
    outputs = [model.train()(input_ids=random_ids(), labels=random_ids()) for model in (ours, theirs)]
    for output in outputs:
        output.loss.backward()
    assert relative(outputs[0].logits, outputs[1].logits) < 1e-5
    gradients = [
        {name: value.grad for name, value in sorted(model.named_parameters()) if value.requires_grad}
        for model in (ours, theirs)
    ]
    assert len(gradients[0]) == len(gradients[1]) == len(own)
    for (name, gradient), theirs_ in zip(gradients[0].items(), gradients[1].values(), strict=True):
        assert relative(gradient, theirs_) < 1e-4, name
    again = ours(input_ids=random_ids(), labels=random_ids())
    assert relative(again.logits, outputs[0].logits) < 1e-6


def test_the_merged_weight_is_that_of_fp64() -> None:
    layer = DoRALinear(nn.Linear(24, 16), 24, 16, r=4, lora_alpha=6)
    moved(dict(layer.adapter_tensors()))
    w0, a, b = (each.double() for each in (layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    sum_ = w0 + layer.scaling * b @ a
    expected = layer.lora_magnitude_vector.double()[:, None] * sum_ / sum_.norm(dim=1, keepdim=True)
    x = torch.randn(3, 24)
    output = x.double() @ expected.T + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(x).double(), output, rtol=0, atol=1e-5)
    torch.testing.assert_close((layer.delta_weight() + layer.weight).double(), expected, rtol=0, atol=1e-6)
    weight = layer.weight.detach().clone()
    layer.check_delta(weight)
    layer.add_delta(weight)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)


def test_an_overflow_is_refused_and_the_model_unchanged() -> None:
    model = inject(make_model("llama", torch.float16), LoraConfig(**options_of(0.0)))
    layers = dict(lora_layers(model))
    first = next(iter(layers.values()))
    with torch.no_grad():
        first.lora_magnitude_vector.mul_(1e6)
    before = first.weight.clone()
    with pytest.raises(LoRAError, match=r"not finite in torch\.float16"):
        merge_in_place(model)
    assert torch.equal(first.weight, before)
