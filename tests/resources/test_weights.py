"""Bytes counted on a skeleton are those of real models, plain and quantised by bitsandbytes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from plainlora.resources.weights import weight_bytes
from tests.conftest import CONFIGS, load_quantized, make_model

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "NF4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def real_bytes(model: PreTrainedModel) -> int:
    """All that a loaded model's weights hold, bitsandbytes' scales and tables included."""
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            total += state.absmax.nbytes + state.code.nbytes
            if state.nested:
                total += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
        total += scales.nbytes if (scales := getattr(parameter, "SCB", None)) is not None else 0
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_bytes_of_weights_are_those_of_the_real_model(kind: str, dtype: torch.dtype) -> None:
    assert weight_bytes(skeleton(CONFIGS[kind]()), None, dtype) == real_bytes(make_model(kind, dtype))


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_bytes_of_quantized_weights_are_those_of_bitsandbytes(
    kind: str, name: str, model_dirs: dict[str, Path]
) -> None:
    counted = weight_bytes(skeleton(CONFIGS[kind]()), BitsAndBytesConfig(**QUANTIZATIONS[name]), torch.float32)
    assert counted == real_bytes(load_quantized(model_dirs[kind], **QUANTIZATIONS[name]))
