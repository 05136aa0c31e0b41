"""Bytes of a base's weights in each number format, from its skeleton on the `meta` device."""

import copy
import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

# bitsandbytes' 4 bits: weights for each scale and, with double quantisation, scales for each scale of scales (QLoRA,
# Dettmers et al. 2023, arXiv:2305.14314, section 3); then bytes of the tables of 16 and 256 values that codes stand
# for.
BLOCK, BLOCK_OF_SCALES = 64, 256
TABLE, TABLE_OF_SCALES = 16 * 4, 256 * 4 + 4


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of some tensors' values."""
    return sum(tensor.nbytes for tensor in tensors)


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype of a checkpoint, by its config; fp32 if the config names none."""
    own = getattr(config, "dtype", None)
    own = getattr(torch, own, None) if isinstance(own, str) else own
    return own if isinstance(own, torch.dtype) else torch.float32


def stored_quantization(config: PretrainedConfig) -> BitsAndBytesConfig | None:
    """The bitsandbytes quantisation in the config of a checkpoint or of a loaded model; `None` if there is none."""
    own = getattr(config, "quantization_config", None)
    if isinstance(own, dict) and own.get("quant_method") == "bitsandbytes":
        return BitsAndBytesConfig.from_dict(own)
    return own if isinstance(own, BitsAndBytesConfig) else None


def nf4_bytes(values: int, nested: bool) -> int:
    """Bytes of one 4-bit weight with its scales and tables.

    Args:
        values: Number of its values.
        nested: Whether the scales are quantised too (double quantisation).
    """
    blocks = math.ceil(values / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / BLOCK_OF_SCALES) + TABLE_OF_SCALES if nested else 4 * blocks
    return math.ceil(values / 2) + scales + TABLE


def quantized_weights(
    skeleton: PreTrainedModel, quantization: BitsAndBytesConfig, dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    """The weights that Transformers' own quantiser would quantise, by name. A classifier's head is not quantised."""
    quantization, replaced = copy.deepcopy(quantization), copy.deepcopy(skeleton)
    if type(skeleton).__name__.endswith("ForSequenceClassification"):
        quantization.llm_int8_skip_modules = [
            name for name, _ in skeleton.named_children() if name != skeleton.base_model_prefix
        ]
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=replaced, dtype=dtype, device_map=None)
    parameters = dict(skeleton.named_parameters())
    return {
        name: parameters[name]
        for name, _ in replaced.named_parameters()
        if quantizer.param_needs_quantization(replaced, name)
    }


def parameter_bytes(
    skeleton: PreTrainedModel, quantization: BitsAndBytesConfig | None, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that each of a base's weights holds in memory, by name. Arguments are those of `weight_bytes`."""
    parameters = dict(skeleton.named_parameters())
    quantized = {} if quantization is None else quantized_weights(skeleton, quantization, dtype)
    sizes = {name: parameter.numel() * dtype.itemsize for name, parameter in parameters.items()}
    for name, parameter in quantized.items():
        values = parameter.numel()
        if cast(BitsAndBytesConfig, quantization).load_in_4bit:
            sizes[name] = nf4_bytes(values, cast(BitsAndBytesConfig, quantization).bnb_4bit_use_double_quant)
        else:
            module = skeleton.get_submodule(name.rpartition(".")[0])
            outputs = module.nf if isinstance(module, Conv1D) else cast(nn.Linear, module).out_features
            sizes[name] = values + 4 * outputs  # one scale a row
    return sizes


def weight_bytes(skeleton: PreTrainedModel, quantization: BitsAndBytesConfig | None, dtype: torch.dtype) -> int:
    """Bytes that a base's weights and buffers hold in memory.

    Args:
        skeleton: The base without an adapter, of any dtype.
        quantization: bitsandbytes' 4 or 8 bits, or `None`.
        dtype: The dtype of weights that are not quantised.
    """
    return count_bytes(skeleton.buffers()) + sum(parameter_bytes(skeleton, quantization, dtype).values())


def bytes_by_format(skeleton: PreTrainedModel, dtype: torch.dtype) -> dict[str, int]:
    """As `weight_bytes`, for each number format that a run can choose.

    Args:
        skeleton: The base without an adapter.
        dtype: The dtype of weights that are not quantised.
    """
    nf4, double = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
        for nested in (False, True)
    )
    return {
        "fp32": weight_bytes(skeleton, None, torch.float32),
        "bf16": weight_bytes(skeleton, None, torch.bfloat16),
        "NF4": weight_bytes(skeleton, nf4, dtype),
        "NF4 double": weight_bytes(skeleton, double, dtype),
    }
