"""Activations are kept where they fit and computed again where they do not."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, OPTConfig, PretrainedConfig
from trl import SFTConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.resources.activations import Batch, Step, count_peak_bytes
from plainlora.resources.checkpointing import needs_checkpointing
from tests.conftest import CONFIGS, SPECIAL, VOCABULARY

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])


def settings(folder: Path) -> SFTConfig:
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 3, "max_length": 64}
    return SFTConfig(output_dir=str(folder), **plain)


def decide(folder: Path, free: int | None, config: PretrainedConfig) -> tuple[bool, str]:
    said: list[str] = []
    base = AutoModelForCausalLM.from_config(config)
    attach_adapter(base, copy.deepcopy(LORA), BACKENDS["fused"])
    fits = needs_checkpointing(settings(folder), base, LORA, BACKENDS["fused"], "float32", 64, 40, free, said.append)
    (line,) = said
    return fits, line


def test_what_fits_is_kept_and_what_does_not_is_computed_again(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    model = AutoModelForCausalLM.from_config(config)
    attach_adapter(model, copy.deepcopy(LORA), BACKENDS["fused"])
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    held = count_peak_bytes(
        Step(
            config,
            lambda skeleton: attach_adapter(skeleton, copy.deepcopy(LORA), BACKENDS["fused"]),
            Batch(3, 64, masked=True),
            torch.device("cpu"),
        )
    ).resident
    enough = int(held / 0.8) + weights + 3 * trained + 2
    assert decide(tmp_path, enough, config) == (
        False,
        f"activations: {held / 1e9:.1f} GB for 3 x 64 tokens, 0.0 GB free: no gradient checkpointing",
    )
    assert decide(tmp_path, enough - 10, config)[0]
    needed, said = decide(tmp_path, 0, config)
    assert needed
    assert said.endswith("0.0 GB free: gradient checkpointing")


def test_what_is_unknown_or_cannot_be_counted_means_checkpointing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert decide(tmp_path, None, CONFIGS["llama"]()) == (
        True,
        "free memory of cpu is unknown: gradient checkpointing",
    )
    opt = OPTConfig(  # it takes no mask of four dimensions
        hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=64,
        vocab_size=VOCABULARY, **SPECIAL,
    )  # fmt: skip
    needed, said = decide(tmp_path, 2**50, opt)
    assert needed
    assert said.startswith("activations cannot be counted (")
    assert said.endswith("): gradient checkpointing")
    assert "\n" not in said
    assert not caplog.records  # Torch would print a traceback
