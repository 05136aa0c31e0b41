"""Tiny adapters of every family that can be exported, with their bases, made from configs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from plainlora.export.proof import find_llama_cpp
from tests.conftest import VOCABULARY

needs_llama_cpp = pytest.mark.skipif(find_llama_cpp() is None, reason="not run: no llama.cpp (make llama-cpp)")

_ROLES = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0, "vocab_size": VOCABULARY}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def config_of(kind: str, **options: Any) -> PretrainedConfig:
    """Two layers, with fewer heads for keys than for queries where the family can."""
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}
        return GPT2Config(**sizes | _ROLES | options)
    kinds: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    return kinds[kind](**_SIZES | _ROLES | options)


def make_adapter(
    folder: Path,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: dict[str, Any] | None = None,
    **lora: Any,
) -> Path:
    """An adapter in `folder / "adapter"` by live PEFT, whose B is not zero, on a base in `folder / "base"`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, **base or {}))
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide what is read wrongly
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"} | lora
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(**options))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder / "adapter"
