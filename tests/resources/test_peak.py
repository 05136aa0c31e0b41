"""The peak is the sum of what is held at the same time."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MixtralConfig
from trl import SFTConfig

from plainlora.errors import UserError
from plainlora.resources.memory import free_memory
from plainlora.resources.peak import MARGIN
from plainlora.resources.weights import weight_bytes
from tests.conftest import CONFIGS, SPECIAL, VOCABULARY
from tests.resources.plans import ask, settings


def test_an_optimizer_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^optim galore_adamw: it cannot be made here \(.*galore.*\); choose another$"
    ):
        ask(CONFIGS["llama"](), settings(tmp_path, optim="galore_adamw", optim_target_modules=["q_proj"]))


def test_peak_and_verdict_are_the_sum_of_the_parts(tmp_path: Path) -> None:
    found = ask(CONFIGS["llama"](), settings(tmp_path, gradient_checkpointing=False), merge=True)
    memory = found.memory
    assert memory.activations is not None
    assert memory.activations_checkpointed is not None
    assert memory.evaluation is not None
    assert memory.margin == int(MARGIN * max(memory.activations, memory.evaluation)) > 0
    parts = memory.weights + memory.adapters + memory.optimizer + memory.activations + memory.margin
    assert memory.peak == memory.libraries + parts
    assert memory.weights < memory.at_least < parts
    assert memory.activations_checkpointed < memory.activations
    assert memory.fits
    assert found.disk.merged == pytest.approx(found.memory.weights, rel=0.01)
    assert found.disk.needed > found.disk.merged
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "without gradient checkpointing" in "\n".join(found.lines())
    wide = CONFIGS["llama"]()
    wide.intermediate_size = 2**30  # terabytes of weights fit nowhere
    large = ask(wide, settings(tmp_path))
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert large.memory.peak is not None
    assert large.memory.peak > free
    assert large.memory.checkpointing
    assert large.memory.fits is False
    assert any("DOES NOT FIT" in line for line in large.lines())
    held = ask(CONFIGS["llama"](), settings(tmp_path, gradient_accumulation_steps=4, gradient_checkpointing=False))
    assert held.memory.peak is not None
    assert held.memory.peak - held.memory.libraries == parts + held.memory.gradients


def test_a_quantized_base_keeps_the_pages_of_its_checkpoint_on_a_cpu(tmp_path: Path) -> None:
    training = settings(tmp_path, gradient_checkpointing=False)
    found = ask(CONFIGS["llama"](), training, model={"load_in_4bit": True, "use_bnb_nested_quant": True})
    assert found.memory.weights == found.memory.weights_by_format["NF4 double"] < found.memory.mapped
    assert found.memory.mapped == found.memory.weights_by_format["fp32"]
    assert ask(CONFIGS["llama"](), training).memory.mapped == 0


def test_a_step_that_cannot_be_counted_is_unknown_and_nothing_else_is(tmp_path: Path) -> None:
    sparse = MixtralConfig(  # which expert gets which token depends on values
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, vocab_size=VOCABULARY, experts_implementation="eager", **SPECIAL,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    found = ask(sparse, settings(tmp_path), lora)
    assert found.memory.peak is None
    assert found.memory.fits is None
    assert found.memory.activations is None
    assert found.memory.checkpointing
    assert found.memory.weights == weight_bytes(AutoModelForCausalLM.from_config(sparse), None, torch.float32)
    assert "unknown" in "\n".join(found.lines())
    # What no such run does without is a verdict all the same, where that alone is too much.
    long = ask(sparse, settings(tmp_path), lora, longest=2**50)
    assert long.memory.needed is None
    assert long.memory.fits is False
    assert long.memory.at_least - found.memory.at_least == 2 * (2**50 - 64) * 64 * 4  # rows, tokens, width, fp32
    assert any("at least" in line and "DOES NOT FIT" in line for line in long.lines())


def test_training_arguments_of_trl_are_taken_too(tmp_path: Path) -> None:
    plain = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=64)
    assert ask(CONFIGS["llama"](), plain).memory.checkpointing  # TRL's default
