"""torchao's int8, level by level beside PEFT; what else torchao stores is refused by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from plainlora import fuse, inject
from plainlora.lora.errors import LoRAError
from plainlora.lora.storage import find_storage, is_quantized, is_supported
from plainlora.parity.case import FORMS
from plainlora.parity.compare import compare
from plainlora.parity.observe import LEVELS
from plainlora.parity.suite import built_in_cases
from plainlora.parity.tiny import llama_config, quiet_models, random_model

CONFIG = LoraConfig(task_type="CAUSAL_LM", r=6, lora_alpha=16, target_modules="all-linear")
pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")


def quantized(config: Any) -> PreTrainedModel:
    """A tiny Llama whose linear layers, but for its head, torchao has quantised."""
    from torchao.quantization import quantize_

    model = random_model(llama_config())
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)
    return model


def int8() -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig

    return quantized(Int8WeightOnlyConfig(version=2))


@pytest.mark.parametrize("form", FORMS)
def test_int8_is_peft_s_at_every_level(form: str) -> None:
    case = replace(next(built_in_cases(steps=2)), name="Llama, int8", make_base=int8, lora_backend=form)
    with quiet_models():
        result = compare(case)
    assert [(verdict.level, verdict.status) for verdict in result.verdicts] == [(level, "pass") for level in LEVELS]
    if form == "reference":
        assert {verdict.level for verdict in result.verdicts if not verdict.identical} <= {"merge"}
    else:
        assert result.environment["fused layers"] == "14 of 14"


def test_int8_is_told_from_a_dense_layer() -> None:
    layer = int8().model.layers[0].mlp.up_proj
    assert type(layer) is nn.Linear
    assert is_quantized(layer)
    assert is_supported(layer)
    storage = find_storage(layer)
    assert storage is not None
    assert storage.features(layer) == (64, 128)
    x = torch.randn(3, 64)
    assert torch.allclose(layer(x), x @ storage.dense_weight(layer, torch.float32).T, atol=1e-6)
    with pytest.raises(LoRAError, match="cannot merge into quantised weights"):
        storage.writable_weight(layer)


def test_activations_of_few_bits_are_refused_by_name() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    model = quantized(Int8DynamicActivationInt8WeightConfig(version=2))
    with pytest.raises(LoRAError, match=r"q_proj' is a Linear whose weight is a Int8Tensor; this LoRA adapts"):
        inject(model, CONFIG)
    assert not hasattr(model, "plainlora")


class Unknown(torch.Tensor):
    """A tensor of a class that nobody here has heard of."""


def test_a_weight_of_an_unknown_class_is_refused_by_name() -> None:
    model = random_model(llama_config())
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Unknown), requires_grad=False)
    assert not is_supported(layer)
    with pytest.raises(LoRAError, match=r"layers.1.mlp.up_proj' is a Linear whose weight is a Unknown;"):
        inject(model, CONFIG)
    assert fuse(model).fused == {"SwiGLU": 2}
