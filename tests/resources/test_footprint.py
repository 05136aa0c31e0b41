"""What is said of a run from its config alone is what real models have."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)

from plainlora.backends import BACKENDS, attach_adapter, count_parameters
from plainlora.resources.footprint import count_targets
from plainlora.resources.weights import weight_bytes
from plainlora.settings.arguments import ClassifyConfig
from tests.conftest import BACKBONES, CONFIGS, make_model
from tests.resources.plans import ask, settings

# What the README and PEFT's own examples count on the full-size architectures.
FULL_SIZE: dict[str, tuple[Callable[[], PretrainedConfig], LoraConfig, int, int]] = {
    "DistilBERT": (
        lambda: DistilBertConfig(num_labels=2),
        LoraConfig(r=8, target_modules=["q_lin", "v_lin"]),
        147_456,
        66_955_010,
    ),
    "DistilBERT with MLP": (
        lambda: DistilBertConfig(num_labels=2),
        LoraConfig(r=8, target_modules=["q_lin", "v_lin", "lin1", "lin2"]),
        516_096,
        66_955_010,
    ),
    "GPT-2": (GPT2Config, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"), 294_912, 124_439_808),
    "Llama-2-7b": (
        LlamaConfig,
        LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
        4_194_304,
        6_738_415_616,
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models_are_counted_without_a_weight(name: str) -> None:
    make, lora, trained, base = FULL_SIZE[name]
    auto = AutoModelForSequenceClassification if name.startswith("DistilBERT") else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(make())
        assert weight_bytes(model, None, torch.bfloat16) == pytest.approx(2 * base, rel=0.001)
        if name == "Llama-2-7b":  # as its recipe's header says
            assert weight_bytes(model, BitsAndBytesConfig(load_in_4bit=True), torch.float16) == pytest.approx(
                4.2e9, rel=0.01
            )
        attach_adapter(model, copy.deepcopy(lora), BACKENDS["fused"])
    assert count_parameters(model) == (trained, base + trained)
    assert sum(target.trainable for target in count_targets(model).values()) == trained


def test_a_classifiers_recipe_is_estimated_at_full_size(tmp_path: Path) -> None:
    make, lora, trained, base = FULL_SIZE["DistilBERT"]
    training = ClassifyConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=12)
    found = ask(make(), training, lora, longest=512, labels=["no", "yes"])
    assert (found.parameters.trainable, found.parameters.total) == (trained, base + trained)
    assert found.memory.adapters == found.memory.gradients == 4 * trained
    assert found.memory.optimizer == pytest.approx(8 * trained, rel=0.001)
    assert found.memory.weights == pytest.approx(4 * base, rel=0.001)
    assert found.memory.loss_head is None
    assert found.memory.activations is not None
    assert 1e9 < found.memory.activations < 2.5e9  # twice as much without fused attention with dropout
    kept = ask(make(), training, lora, longest=512, labels=["no", "yes"], backend="reference").memory.activations
    assert kept is not None
    assert 3e9 < kept < 5e9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_and_their_names_are_those_of_the_real_model(kind: str, backend: str, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", rank_pattern={"c_fc|up_proj": 2})
    real = attach_adapter(make_model(kind), copy.deepcopy(lora), BACKENDS[backend])
    found = ask(CONFIGS[kind](), settings(tmp_path, gradient_checkpointing=False), lora, backend=backend)
    assert (found.parameters.trainable, found.parameters.total) == count_parameters(real)
    assert found.parameters.targets == count_targets(real)
    names = {"gpt2": "c_fc", "llama": "up_proj", "qwen2": "up_proj"}
    (wide, narrow) = (128, 64) if kind != "gpt2" else (256, 64)
    target = found.parameters.targets[names[kind]]
    assert target.trainable == 2 * 2 * (wide + narrow)  # layers, rank
    assert target.total == target.trainable + 2 * wide * narrow + (2 * wide if kind == "gpt2" else 0)


def test_methods_without_an_adapter_train_the_models_own_weights(tmp_path: Path) -> None:
    training = ClassifyConfig(output_dir=str(tmp_path), use_cpu=True, save_strategy="epoch", save_total_limit=1)
    config = BACKBONES["distilbert"]()
    labels = ["no", "yes"]
    full = ask(config, training, None, labels=labels)
    last = ask(config, training, None, labels=labels, trained_modules=["pre_classifier", "classifier"])
    assert full.parameters.trainable == full.parameters.total == last.parameters.total
    assert last.parameters.trainable == 64 * 64 + 64 + 2 * 64 + 2
    assert full.memory.gradients == full.memory.initial == 4 * full.parameters.total
    assert full.memory.adapters == last.memory.adapters == 0
    assert full.memory.activations is not None
    assert full.memory.margin is not None
    steps = full.memory.activations + full.memory.margin
    assert full.memory.needed == full.memory.weights + full.memory.optimizer + full.memory.initial + steps
    assert last.time.flops < full.time.flops / 2
    assert last.memory.activations is not None
    assert last.memory.activations < full.memory.activations
    assert last.disk.result == full.disk.result > full.memory.weights
