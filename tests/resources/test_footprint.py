"""What is said of a run from its config alone is what real models, optimizers, checkpoints and trainers are."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
)
from trl import ModelConfig, SFTConfig

from plainlora.backends import BACKENDS, attach_adapter, count_parameters
from plainlora.errors import UserError
from plainlora.resources.footprint import (
    Footprint,
    count_flops,
    count_saves,
    count_steps,
    count_targets,
    estimate,
    measure_flops,
    optimizer_bytes,
    weight_bytes,
)
from plainlora.resources.memory import free_memory
from plainlora.settings.arguments import ClassifyConfig, SFTRecipeConfig
from plainlora.training.trainers import AdapterTrainer, hand_over
from tests.conftest import BACKBONES, CONFIGS, SPECIAL, VOCABULARY, load_quantized, make_model

CPU = torch.device("cpu")
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0, target_modules="all-linear")


def settings(folder: Path, **options: Any) -> SFTRecipeConfig:
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": 64, "per_device_train_batch_size": 2}
    return SFTRecipeConfig(output_dir=str(folder), **plain | options)


def ask(config: PretrainedConfig, training: Any, lora: LoraConfig | None = LORA, **options: Any) -> Footprint:
    model = ModelConfig(model_name_or_path="somewhere", dtype="float32", **options.pop("model", {}))
    backend = None if lora is None else BACKENDS[options.pop("backend", "fused")]
    numbers = {"longest": 64, "rows": 40, "tokens": 1200} | options
    return estimate(config, lora, training, model, backend=backend, **numbers)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


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
    assert (found.trainable_parameters, found.total_parameters) == (trained, base + trained)
    assert found.adapters == found.gradients == 4 * trained
    assert found.optimizer == pytest.approx(8 * trained, rel=0.001)
    assert found.weights == pytest.approx(4 * base, rel=0.001)
    assert found.loss_head is None
    assert found.activations is not None
    assert 3e9 < found.activations < 5e9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_and_their_names_are_those_of_the_real_model(kind: str, backend: str, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", rank_pattern={"c_fc|up_proj": 2})
    real = attach_adapter(make_model(kind), copy.deepcopy(lora), BACKENDS[backend])
    found = ask(CONFIGS[kind](), settings(tmp_path, gradient_checkpointing=False), lora, backend=backend)
    assert (found.trainable_parameters, found.total_parameters) == count_parameters(real)
    assert found.targets == count_targets(real)
    names = {"gpt2": "c_fc", "llama": "up_proj", "qwen2": "up_proj"}
    (wide, narrow) = (128, 64) if kind != "gpt2" else (256, 64)
    target = found.targets[names[kind]]
    assert target.trainable == 2 * 2 * (wide + narrow)  # layers, rank
    assert target.total == target.trainable + 2 * wide * narrow + (2 * wide if kind == "gpt2" else 0)


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


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "NF4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


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


OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "paged_adamw_32bit", "adamw_8bit", "lion_32bit", "sgd", "adafactor")


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_bytes_of_the_optimizer_are_those_of_its_state(optim: str, tmp_path: Path) -> None:
    training = settings(tmp_path, optim=optim)
    parameters = [torch.nn.Parameter(torch.ones(*shape)) for shape in ((300, 100), (64, 64), (10,))]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(training)
    optimizer = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    real = sum({tensor.data_ptr(): tensor.nbytes for tensor in state}.values())
    assert optimizer_bytes(training, parameters) == real
    assert (real > 0) == (optim != "sgd")


def test_an_optimizer_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^optim galore_adamw: it cannot be made here \(.*galore.*\); choose another$"
    ):
        ask(CONFIGS["llama"](), settings(tmp_path, optim="galore_adamw", optim_target_modules=["q_proj"]))


def test_a_checkpoint_takes_what_was_said_and_the_run_has_as_many_steps(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=64, target_modules="all-linear")
    training = settings(
        tmp_path, num_train_epochs=1.5, per_device_train_batch_size=3, gradient_accumulation_steps=2, save_steps=3,
        save_total_limit=2, logging_steps=1, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    config = CONFIGS["llama"]()
    found = ask(config, training, lora, rows=37, tokens=37 * 24, tokenizer=tokenizer)
    rows = Dataset.from_dict({name: [[5] * 24] * 37 for name in ("input_ids", "labels")})
    backend = BACKENDS["fused"]
    model = attach_adapter(AutoModelForCausalLM.from_config(config), lora, backend)
    trainer = AdapterTrainer(
        model, backend, args=hand_over(training), train_dataset=rows, processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in checkpoints]
    assert found.steps == trainer.state.global_step == 11
    assert found.tokens == pytest.approx(1.5 * 37 * 24, rel=0.1)
    assert len(sizes) == 2
    assert found.checkpoints == 3  # the third is written before the first goes
    assert max(sizes) == pytest.approx(found.checkpoint, rel=0.05)
    assert found.disk_needed == 3 * found.checkpoint + found.result


@pytest.mark.parametrize(
    ("options", "saves"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 5}, 5),
        ({"save_strategy": "epoch", "num_train_epochs": 5, "save_total_limit": 1}, 2),
        ({"save_strategy": "steps", "save_steps": 30}, 4),
        ({"save_strategy": "steps", "save_steps": 0.5}, 2),
        ({"save_strategy": "steps", "save_steps": 10, "save_total_limit": 20}, 10),
        (
            {
                "save_strategy": "steps", "save_steps": 10, "save_total_limit": 1, "load_best_model_at_end": True,
                "eval_strategy": "steps", "eval_steps": 10,
            },
            3,
        ),
    ],
)  # fmt: skip
def test_as_many_checkpoints_lie_there_as_the_limit_lets(options: dict[str, Any], saves: int, tmp_path: Path) -> None:
    assert count_saves(settings(tmp_path, **options), 100) == saves
    assert count_steps(settings(tmp_path, max_steps=7), 1000) == 7


def test_the_operations_are_two_a_weight_and_token_in_each_pass() -> None:
    model = attach_adapter(make_model("llama"), copy.deepcopy(LORA), BACKENDS["reference"])
    assert isinstance(model, PreTrainedModel)
    head = VOCABULARY * 64
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    adapter, _ = count_parameters(model)
    tokens, trained = 1000, 100
    frozen = 4 * (linear * tokens + head * trained) + 6 * adapter * tokens
    assert count_flops(model, tokens, trained, checkpointing=False, frozen=True) == frozen
    again = frozen + 2 * (linear + adapter) * tokens
    assert count_flops(model, tokens, trained, checkpointing=True, frozen=True) == again
    assert measure_flops(CPU, torch.float32) > 1e8


def test_methods_without_an_adapter_train_the_models_own_weights(tmp_path: Path) -> None:
    training = ClassifyConfig(output_dir=str(tmp_path), use_cpu=True, save_strategy="epoch", save_total_limit=1)
    config = BACKBONES["distilbert"]()
    labels = ["no", "yes"]
    full = ask(config, training, None, labels=labels)
    last = ask(config, training, None, labels=labels, trained_modules=["pre_classifier", "classifier"])
    assert full.trainable_parameters == full.total_parameters == last.total_parameters
    assert last.trainable_parameters == 64 * 64 + 64 + 2 * 64 + 2
    assert full.gradients == full.initial == 4 * full.total_parameters
    assert full.adapters == last.adapters == 0
    assert last.flops < full.flops / 2
    assert full.activations is not None
    assert last.activations is not None
    assert last.activations < full.activations
    assert last.result == full.result > full.weights


def test_peak_and_verdict_are_the_sum_of_the_parts(tmp_path: Path) -> None:
    found = ask(CONFIGS["llama"](), settings(tmp_path, gradient_checkpointing=False), merge=True)
    assert found.activations is not None
    assert found.activations_checkpointed is not None
    assert found.holes is not None
    parts = found.weights + found.adapters + found.optimizer + found.activations + found.holes
    assert found.peak == found.libraries + parts
    assert found.activations_checkpointed < found.activations
    assert found.fits
    assert found.merged == pytest.approx(found.weights, rel=0.01)
    assert found.disk_needed > found.merged
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "without gradient checkpointing" in "\n".join(found.lines())
    wide = CONFIGS["llama"]()
    wide.intermediate_size = 2**30  # terabytes of weights fit nowhere
    large = ask(wide, settings(tmp_path))
    free = free_memory(CPU)
    assert free is not None
    assert large.peak is not None
    assert large.peak > free
    assert large.checkpointing
    assert large.fits is False
    assert any("DOES NOT FIT" in line for line in large.lines())
    held = ask(CONFIGS["llama"](), settings(tmp_path, gradient_accumulation_steps=4, gradient_checkpointing=False))
    assert held.peak is not None
    assert held.peak - held.libraries == parts + held.gradients


def test_a_quantized_base_keeps_the_pages_of_its_checkpoint_on_a_cpu(tmp_path: Path) -> None:
    training = settings(tmp_path, gradient_checkpointing=False)
    found = ask(CONFIGS["llama"](), training, model={"load_in_4bit": True, "use_bnb_nested_quant": True})
    assert found.weights == found.weights_by_format["NF4 double"] < found.mapped
    assert found.mapped == found.weights_by_format["fp32"]
    assert ask(CONFIGS["llama"](), training).mapped == 0


def test_a_step_that_cannot_be_counted_is_unknown_and_nothing_else_is(tmp_path: Path) -> None:
    sparse = MixtralConfig(  # which expert gets which token depends on values
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, vocab_size=VOCABULARY, experts_implementation="eager", **SPECIAL,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    found = ask(sparse, settings(tmp_path), lora)
    assert found.peak is None
    assert found.fits is None
    assert found.activations is None
    assert found.checkpointing
    assert found.weights == weight_bytes(AutoModelForCausalLM.from_config(sparse), None, torch.float32)
    assert "unknown" in "\n".join(found.lines())


def test_training_arguments_of_trl_are_taken_too(tmp_path: Path) -> None:
    plain = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=64)
    assert ask(CONFIGS["llama"](), plain).checkpointing  # TRL's default
