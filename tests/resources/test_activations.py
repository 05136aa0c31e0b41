"""What is counted on tensors without values is what a real step allocates, and the decision follows from it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig
from trl.trainer.utils import add_fused_lm_head

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.fast import head as loss
from plainlora.fast.loss_head import LossHead
from plainlora.resources import activations
from plainlora.resources.activations import (
    Batch,
    LiveBytes,
    Step,
    count_evaluation_bytes,
    count_head_bytes,
    count_peak_bytes,
    largest_batch,
    least_bytes,
)
from plainlora.training.trainers import AdapterTrainer, args_for_sft
from tests.conftest import BACKBONES, CONFIGS, make_model
from tests.fake_gpu import fake_gpu

LENGTH, CPU = 256, torch.device("cpu")
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0, target_modules="all-linear")


def make_config(kind: str, dropout: float = 0.0) -> PretrainedConfig:
    config = CONFIGS[kind]()
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def attach(model: PreTrainedModel, backend: str) -> torch.nn.Module:
    return attach_adapter(model, copy.deepcopy(LORA), BACKENDS[backend])


def attach_with_tokens(model: PreTrainedModel) -> torch.nn.Module:
    config = replace(copy.deepcopy(LORA), trainable_token_indices=[5, 6])
    return attach_adapter(model, config, BACKENDS["peft_fused"])


def a_step(config: PretrainedConfig, rows: int, backend: str = "fused", **options: Any) -> Step:
    batch = Batch(rows, options.pop("length", LENGTH), masked=rows > 1)
    head = BACKENDS[backend].fast
    return Step(config, lambda base: attach(base, backend), batch, CPU, one_pass_head=head, **options)


def count(config: PretrainedConfig, rows: int, backend: str = "fused", **options: Any) -> int:
    return count_peak_bytes(a_step(config, rows, backend, **options))


def with_tensors(counts: Callable[[], int]) -> tuple[int, int]:
    """What is counted, and how many tensors that made, those of tiles that were counted apart left out."""
    made = 0

    class Watched(LiveBytes):
        def _count(self, storage: torch.UntypedStorage) -> None:
            nonlocal made
            made += self._outer is None
            super()._count(storage)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(activations, "LiveBytes", Watched)
        return counts(), made


def watch(step: Callable[[], object]) -> int:
    """The most that PyTorch's allocator holds while something runs, as its profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def allocate(
    config: PretrainedConfig, rows: int, backend: str = "fused", autocast: bool = False, checkpointing: bool = False
) -> int:
    """The same of a real step, through the head that SFTTrainer would use."""
    base = AutoModelForCausalLM.from_config(config)
    model = attach(base, backend).train()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    if BACKENDS[backend].fast:
        LossHead(base)
    if checkpointing:
        base.activation_checkpointing_enable()
    return watch(a_loss(model, rows, autocast))


def a_loss(model: torch.nn.Module, rows: int, autocast: bool = False) -> Callable[[], None]:
    """A forward and a backward pass."""
    ids = torch.ones(rows, LENGTH, dtype=torch.long)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, LENGTH // 2 :] = 0

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).loss
        loss.backward()

    return step


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_count_is_what_the_allocator_holds_in_a_real_step(kind: str, dropout: float) -> None:
    config = make_config(kind, dropout)
    for rows in (1, 3):
        assert count(copy.deepcopy(config), rows) == pytest.approx(allocate(config, rows), rel=0.02)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_trained_tokens_in_a_tied_head_are_counted_with_all_logits(kind: str) -> None:
    """Neither fused head takes PEFT's wrapper of the head, so such a run uses the model's own forward."""
    config = make_config(kind)
    config.vocab_size = 4096
    assert config.tie_word_embeddings
    for rows in (1, 3):
        batch = Batch(rows, LENGTH, masked=rows > 1)
        counted = count_peak_bytes(Step(copy.deepcopy(config), attach_with_tokens, batch, CPU, one_pass_head=True))
        base = AutoModelForCausalLM.from_config(config)
        model = attach_with_tokens(base).train()
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        LossHead(base, "own")
        assert counted == pytest.approx(watch(a_loss(model, rows)), rel=0.03)


def test_mixed_precision_is_counted_as_it_runs() -> None:
    config = make_config("llama")
    half = count(copy.deepcopy(config), 3, autocast=torch.bfloat16)
    assert half == pytest.approx(allocate(config, 3, autocast=True), rel=0.1)
    assert half < count(config, 3)


def test_attention_with_dropout_keeps_its_scores_and_without_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plainlora.fast.attention.LEAST", 0)  # of scores; these are few
    scores = 2 * 2 * (4 * LENGTH) ** 2  # layers, heads
    for backend, fewest, most in (("reference", 4, 20), ("fused", 1, 3)):  # bytes of each
        short, long = (count(make_config("llama"), 1, backend, length=length) for length in (LENGTH, 4 * LENGTH))
        assert long < 4.1 * short
        kept = count(make_config("llama", 0.1), 1, backend, length=4 * LENGTH) - long
        assert fewest * scores < kept < most * scores


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpointed_step_is_counted_as_it_runs(kind: str) -> None:
    config = make_config(kind, 0.1)
    again = count_peak_bytes(a_step(config, 3), checkpointing=True)
    # The backward pass of attention with dropout holds one tensor of a query's size that is not counted.
    query = 3 * LENGTH * 64 * 4
    assert again + query == pytest.approx(allocate(config, 3, checkpointing=True), rel=0.03)
    assert again < 0.8 * count(config, 3)


@pytest.mark.parametrize("backend", ["reference", "peft"])
def test_the_head_of_trl_is_counted_as_it_runs(backend: str) -> None:
    config = make_config("llama")
    head = count_head_bytes(a_step(config, 1, backend))
    assert head > (LENGTH - 1) * 32768 * 4  # a tile of as many words, however few there are
    assert count(config, 1, backend) == pytest.approx(allocate(config, 1, backend), rel=0.05)
    assert count_head_bytes(a_step(config, 1)) < head / 10


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(("backend", "batch"), [("fused", (1, 5000)), ("fused", (3, 1700)), ("peft", (3, 4400))])
def test_a_batch_of_many_tokens_is_counted_from_few_tiles_of_the_head_as_from_all(
    backend: str, batch: tuple[int, int], autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, length = batch
    step = a_step(make_config("llama"), rows, backend, length=length, autocast=autocast)
    counts: list[Callable[[], int]] = [
        lambda: count_peak_bytes(step),
        lambda: count_peak_bytes(step, checkpointing=True),
        lambda: count_evaluation_bytes(step),
        lambda: count_head_bytes(step),
    ]
    few = [with_tensors(each) for each in counts]
    monkeypatch.setattr(activations, "MANY_TOKENS", rows * length)
    for (counted, tensors), (whole, all_tensors) in zip(few, map(with_tensors, counts), strict=True):
        assert counted == pytest.approx(whole, rel=1e-4)
        assert tensors < all_tensors


def test_the_time_of_a_count_does_not_grow_with_the_batch() -> None:
    """Sixty-four rows of 8,192 tokens, as many operations as one row of 4,096 takes, and linear in the rows."""
    config = make_config("llama")
    (_, of_one), (small, of_small), (large, of_large) = (
        with_tensors(partial(count_peak_bytes, a_step(config, rows, length=length)))
        for rows, length in ((1, 4097), (32, 8192), (64, 8192))
    )
    assert of_large == of_small < of_one
    assert large == pytest.approx(2 * small, rel=1e-3)


def test_a_count_that_goes_through_the_tokens_one_by_one_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "OPERATIONS", 50)
    with pytest.raises(RuntimeError, match="a step takes more than 50 operations, as if it computed token by token"):
        count_peak_bytes(a_step(make_config("llama"), 3))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["fused", "peft"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_step_on_a_gpu_is_counted(kind: str, backend: str, autocast: torch.dtype | None) -> None:
    """With dropout in the base and in the adapter. A CPU's kernels differ, but not in what they keep.

    Except for fused attention with dropout, which is for a CPU alone.
    """
    lora = copy.deepcopy(LORA)
    lora.lora_dropout = 0.1

    def prepare(base: PreTrainedModel) -> torch.nn.Module:
        model = attach_adapter(base, copy.deepcopy(lora), BACKENDS[backend])
        base.set_attn_implementation("sdpa")
        return model

    step = replace(a_step(make_config(kind, 0.1), 3, backend, autocast=autocast), prepare=prepare)
    with fake_gpu() as device:
        whole, again = (count_peak_bytes(replace(step, device=device), checkpointing=each) for each in (False, True))
    assert again < whole == pytest.approx(count_peak_bytes(step), rel=0.3)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_head_on_a_gpu_is_counted_by_the_chunk_that_it_takes_there(autocast: torch.dtype | None) -> None:
    config = make_config("llama")
    config.vocab_size = 200_000
    logits = loss.chunk_size("cuda", config.vocab_size) * config.vocab_size * 4
    for length in (4096, 65536):  # run as it is, and counted from a few of its chunks
        with fake_gpu() as device:
            step = replace(a_step(config, 1, length=length, autocast=autocast), device=device)
            head, whole = count_head_bytes(step), count_peak_bytes(step)
        # Beside them what is multiplied, in half precision, and the entropy's products.
        assert head == pytest.approx((1.85 if autocast else 1.25) * logits, rel=0.1)
        assert head < whole


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("kind", CONFIGS)
def test_no_step_holds_less_than_is_said_without_running_it(kind: str, layers: list[int] | None) -> None:
    config, lora = make_config(kind), copy.deepcopy(LORA)
    if layers:
        lora.target_modules, lora.layers_to_transform = {"gpt2": ["c_fc"]}.get(kind, ["up_proj"]), layers
    for autocast in (None, torch.bfloat16):
        batch = Batch(3, LENGTH, masked=True)
        step = Step(config, lambda base: attach_adapter(base, lora, BACKENDS["fused"]), batch, CPU, autocast=autocast)
        least = least_bytes(step, step.build())
        assert 0 < least < min(count_peak_bytes(step, checkpointing=again) for again in (True, False))
        hidden = 3 * LENGTH * 64 * (2 if autocast else 4)
        assert least == hidden * (1 if layers else 2)  # layers


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_classifier_is_counted_as_it_runs(kind: str) -> None:
    config = BACKBONES[kind]()
    config.pad_token_id = 0
    step = Step(copy.deepcopy(config), lambda base: None, Batch(8, 64, masked=True), CPU, classifies=True)
    model = AutoModelForSequenceClassification.from_config(config).train()
    ids, labels = torch.ones(8, 64, dtype=torch.long), torch.zeros(8, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 32:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    real = watch(lambda: cast(torch.Tensor, model(**inputs).loss).backward())
    assert count_peak_bytes(step) == pytest.approx(real, rel=0.05)
    with torch.no_grad():
        real = watch(lambda: model.eval()(**inputs))
    assert count_evaluation_bytes(step) == pytest.approx(real, rel=0.1)


def test_counting_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    count(make_config("gpt2", 0.1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def settings(folder: Path, **options: Any) -> SFTConfig:
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 3, "max_length": 64}
    return SFTConfig(output_dir=str(folder), **plain | options)


@pytest.mark.parametrize("packing", [True, False])
def test_the_largest_batch_is_what_the_trainer_collates(
    packing: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    args = settings(tmp_path, packing=packing)
    expected = largest_batch(args, 64)
    for name in ("fused", "reference"):
        base, backend = make_model("llama"), BACKENDS[name]
        rows = Dataset.from_dict({name: [[5] * 64] * 6 for name in ("input_ids", "labels")})
        trainer = AdapterTrainer(
            attach_adapter(base, copy.deepcopy(LORA), backend), backend, args=args_for_sft(args), train_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip
        shape = next(iter(trainer.get_train_dataloader()))["input_ids"].shape
        assert shape.numel() == expected.rows * expected.length
        if name == "reference":  # the other lays the rows of a batch one after the other
            assert tuple(shape) == (expected.rows, expected.length)
    assert expected.masked
    assert not largest_batch(settings(tmp_path, per_device_train_batch_size=1), 64).masked
