"""Attention over documents beside Transformers' own SDPA function with its mask of the same documents."""

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
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from plainlora import fuse, unfuse
from plainlora.fast import attention as own
from plainlora.fast.attention import NAME, DocumentAttention, is_covered
from plainlora.fast.isolation import collate
from tests.conftest import BACKBONES, CONFIGS, VOCABULARY, random_ids

GROUPED: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "pad_token_id": 1,
}  # fmt: skip
KINDS: dict[str, Callable[[], PretrainedConfig]] = {
    **CONFIGS,
    "mistral, a window shorter than a document": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "mistral, a window longer than each": lambda: MistralConfig(**GROUPED, sliding_window=40),
    "gemma3, windows in every other layer": lambda: Gemma3TextConfig(
        **GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}
PHIMOE = {"phimoe": lambda: PhimoeConfig(**GROUPED, num_local_experts=2)}  # its layers get no window
LENGTHS = (13, 1, 30, 30, 7)


def make(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = (KINDS | PHIMOE)[kind]()
    for name, value in options.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def packed_batch() -> dict[str, Any]:
    ids = random_ids(1, sum(LENGTHS))[0].tolist()
    ends = [sum(LENGTHS[: at + 1]) for at in range(len(LENGTHS))]
    return collate([ids[end - length : end] for end, length in zip(ends, LENGTHS, strict=True)], True, 1)


def results(model: PreTrainedModel, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Logits and the gradients of all weights."""
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**batch)
    output.loss.backward()
    return [output.logits.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Relative to the largest element of each tensor; one that is zero but for rounding counts as 1 % of all."""
    assert len(found) == len(expected) > 5
    least = 0.01 * max(float(theirs.abs().max()) for theirs in expected[1:])
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=least))
        for ours, theirs in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_get_what_the_models_own_mask_gives_them(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, batch = make(kind, dtype), packed_batch()
    expected = results(model, batch)
    given = DocumentAttention(model)
    found = results(model, batch)
    assert largest_difference(found, expected) < tolerance
    given.undo()
    assert all(torch.equal(*pair) for pair in zip(results(model, batch), expected, strict=True))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_in_half_precision_on_a_cpu_it_is_no_less_exact_than_the_models_own(kind: str) -> None:
    batch = packed_batch()
    exact = results(make(kind, torch.bfloat16).double(), batch)
    model = make(kind, torch.bfloat16)
    own = results(model, batch)
    DocumentAttention(model)
    found = results(model, batch)
    differences = [largest_difference([each.double() for each in side], exact) for side in (found, own)]
    assert differences[0] < 1.25 * differences[1]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_no_mask_is_built_and_no_score_between_documents(kind: str) -> None:
    """Scores of the documents alone: a mask of the row has L x L elements, which no tensor here has."""
    model, batch = make(kind), packed_batch()
    DocumentAttention(model)
    sizes = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                sizes.append(tuple(found.shape))
            return found

    with Sizes():
        model(**batch)
    length = sum(LENGTHS)
    assert sizes
    assert not [shape for shape in sizes if shape[-2:] == (length, length)]


@pytest.mark.parametrize("least", [0, 1 << 40])
def test_dropout_draws_the_same_numbers_as_without(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "LEAST", least)  # block by block, and by PyTorch
    model, batch = make("gpt2", attn_pdrop=0.3).train(), packed_batch()
    expected = results(model, batch)
    DocumentAttention(model)
    assert largest_difference(results(model, batch), expected) < 2e-6


@pytest.mark.parametrize("least", [0, 1 << 40])
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_fused_classifier_with_dropout_draws_the_numbers_of_one_that_is_not(
    kind: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "LEAST", least)
    batch = {"input_ids": random_ids(3, 20), "labels": torch.tensor([0, 1, 1])}
    batch["attention_mask"] = (torch.arange(20) < torch.tensor([[20], [7], [13]])).long()
    config = BACKBONES[kind]()
    config.pad_token_id = 0
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").train()
        if fused:
            assert fuse(model).fused["attention with dropout"] == 1
            assert model.config._attn_implementation == NAME
        found.append(results(model, batch))
    assert largest_difference(found[1], found[0]) < 2e-6
    unfuse(model)
    assert model.config._attn_implementation == "sdpa"


def test_activations_that_are_computed_again_are_the_same() -> None:
    model, batch = make("llama").train(), packed_batch()
    expected = results(model, batch)
    DocumentAttention(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert largest_difference(results(model, batch), expected) < 2e-6


@pytest.mark.parametrize("kind", CONFIGS)
def test_generation_and_padded_batches_are_the_models_own(kind: str) -> None:
    model = make(kind).eval()
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def outputs() -> list[torch.Tensor]:
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
        return [model(input_ids=ids, attention_mask=mask).logits, model.generate(ids, **options)]

    expected = outputs()
    DocumentAttention(model)
    assert all(torch.equal(*pair) for pair in zip(outputs(), expected, strict=True))


def test_a_saved_config_does_not_name_it(tmp_path: Path) -> None:
    model = make("llama")
    DocumentAttention(model)
    model.save_pretrained(tmp_path)
    assert "plainlora" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_what_does_not_go_through_transformers_sdpa_function_is_not_covered() -> None:
    assert is_covered(make("llama"))
    eager = AutoModelForCausalLM.from_config(Gemma2Config(**GROUPED), attn_implementation="eager")
    assert not is_covered(eager)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_fused_trainer_packed_or_not_has_the_losses_that_it_has_without(
    kind: str, packing: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = [5, 40, 17, 33, 8, 21, 60, 12]
    rows = Dataset.from_dict({"input_ids": [random_ids(1, length)[0].tolist() for length in lengths]})
    found = []
    for fused in (False, True):
        args = SFTConfig(
            output_dir=str(tmp_path), max_steps=4, logging_steps=1, learning_rate=1e-3, use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", eval_strategy="steps", eval_steps=2, disable_tqdm=True,
            per_device_train_batch_size=1 if packing else 4, per_device_eval_batch_size=1 if packing else 4,
            packing=packing, max_length=64, gradient_checkpointing=False,
        )  # fmt: skip
        base = make(kind, **({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}))
        trainer = SFTTrainer(
            base, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        )  # fmt: skip
        trainer._loss_shifts_labels = True  # else Transformers counts the first labels of GPT-2's padded rows
        if fused:
            report = fuse(trainer)
            assert report.fused["attention over documents"] == 1
            assert ("padding-free collator" in report.fused) == (not packing)
        trainer.train()
        found.append([entry[name] for entry in trainer.state.log_history for name in entry if name.endswith("loss")])
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("attention_mask" in batch) == (not packing and not fused)
        assert batch["input_ids"].shape[0] == (1 if packing or fused else 4)
    unfuse(trainer)
    assert ("attention_mask" in next(iter(trainer.get_train_dataloader()))) == (not packing)
    assert len(found[0]) > 5
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_gpt2s_rows_stay_padded_in_a_trainer_that_counts_their_first_labels(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Without padding Transformers would divide the loss by fewer tokens, and the loss would be another one."""
    rows = Dataset.from_dict({"input_ids": [random_ids(1, length)[0].tolist() for length in (5, 40, 17, 33)]})
    found = []
    for fused in (False, True):
        args = SFTConfig(
            output_dir=str(tmp_path), max_steps=2, logging_steps=1, learning_rate=1e-3, use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4,
            gradient_checkpointing=False,
        )  # fmt: skip
        base = make("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, loss_type=None)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        trainer = SFTTrainer(base, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
        assert not trainer._loss_shifts_labels
        if fused:
            assert "padding-free collator" not in fuse(trainer).fused
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "documents"),
    [
        ("llama", {}, 1),
        ("llama", {"attention_chunk_size": 8}, 0),  # as Llama 4's
        ("phimoe", {}, 0),
    ],
)
def test_windows_that_only_the_mask_tells_of_are_left_to_the_model(
    kind: str, options: dict[str, Any], documents: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Some models hand their layers no window, and a document may be longer than those that are measured."""
    rows = Dataset.from_dict({"input_ids": [random_ids(1, length)[0].tolist() for length in (30, 20, 12)]})
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", packing=True, max_length=64,
        per_device_train_batch_size=1, gradient_checkpointing=False,
        router_aux_loss_coef=0.0,  # TRL's own fails on PhiMoE
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    trainer = SFTTrainer(make(kind, **options), args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    assert fuse(trainer).fused.get("attention over documents", 0) == documents


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_a_fused_trainer_predicts_row_by_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"input_ids": [random_ids(1, 12)[0].tolist() for _ in range(6)]})
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=3,
        per_device_train_batch_size=3, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = SFTTrainer(make("llama"), args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    expected = trainer.predict(trainer.train_dataset)
    assert "padding-free collator" in fuse(trainer).fused
    found = trainer.predict(trainer.train_dataset)
    assert found.label_ids.shape == expected.label_ids.shape == (6, 12)
    torch.testing.assert_close(torch.tensor(found.predictions[0]), torch.tensor(expected.predictions[0]))
    assert trainer.data_collator.padding_free
    unfuse(trainer)
    assert "predict" not in vars(trainer)
