"""What is counted on tensors without values is what a real step allocates, and the decision follows from it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig
from trl.trainer.utils import add_fused_lm_head

from plainlora.activations import Batch, count_peak_bytes, largest_batch, needs_checkpointing
from plainlora.backends import BACKENDS, attach_adapter
from plainlora.loss import OnePassHead
from plainlora.memory import free_memory, left_to_cgroup
from plainlora.training import AdapterTrainer, hand_over
from tests.conftest import CONFIGS, SPECIAL, VOCABULARY, make_model

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


def count(config: PretrainedConfig, rows: int, backend: str = "fused", **options: Any) -> int:
    batch = Batch(rows, options.pop("length", LENGTH), masked=rows > 1)
    head = BACKENDS[backend].one_pass_head
    return count_peak_bytes(config, lambda base: attach(base, backend), batch, CPU, one_pass_head=head, **options)


def allocate(config: PretrainedConfig, rows: int, autocast: bool = False) -> int:
    """The most that PyTorch's allocator holds in a real step, as its profiler saw it."""
    base = AutoModelForCausalLM.from_config(config)
    model = attach(base, "fused").train()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    OnePassHead(base)
    ids = torch.ones(rows, LENGTH, dtype=torch.long)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, LENGTH // 2 :] = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).loss
        loss.backward()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_count_is_what_the_allocator_holds_in_a_real_step(kind: str, dropout: float) -> None:
    config = make_config(kind, dropout)
    for rows in (1, 3):
        assert count(copy.deepcopy(config), rows) == pytest.approx(allocate(config, rows), rel=0.02)


def test_mixed_precision_is_counted_as_it_runs() -> None:
    config = make_config("llama")
    half = count(copy.deepcopy(config), 3, autocast=torch.bfloat16)
    assert half == pytest.approx(allocate(config, 3, autocast=True), rel=0.1)
    assert half < count(config, 3)


def test_attention_with_dropout_keeps_its_scores_and_without_it_does_not() -> None:
    scores = 2 * 2 * (4 * LENGTH) ** 2 * 4  # layers, heads, fp32
    short, long = (count(make_config("llama"), 1, length=length) for length in (LENGTH, 4 * LENGTH))
    assert long < 4.1 * short
    assert count(make_config("llama", 0.1), 1, length=4 * LENGTH) > long + scores


@pytest.mark.parametrize("backend", ["reference", "peft"])
def test_the_back_ends_that_leave_the_head_to_trl_count_its_tiles(backend: str) -> None:
    assert count(make_config("llama"), 1, backend) > 9 * (LENGTH - 1) * 32768 * 4
    assert count(make_config("llama"), 1) < 32768 * LENGTH * 4


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
    base = make_model("llama")
    backend = BACKENDS["fused"]
    rows = Dataset.from_dict({name: [[5] * 64] * 6 for name in ("input_ids", "labels")})
    trainer = AdapterTrainer(
        attach_adapter(base, copy.deepcopy(LORA), backend), backend, args=hand_over(args), train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    collated = next(iter(trainer.get_train_dataloader()))
    expected = largest_batch(args, 64)
    assert tuple(collated["input_ids"].shape) == (expected.rows, expected.length)
    assert expected.masked
    assert not largest_batch(settings(tmp_path, per_device_train_batch_size=1), 64).masked


def decide(folder: Path, free: int | None, config: PretrainedConfig) -> tuple[bool, str]:
    said: list[str] = []
    base = AutoModelForCausalLM.from_config(config)
    attach(base, "fused")
    fits = needs_checkpointing(settings(folder), base, LORA, BACKENDS["fused"], "float32", 64, free, said.append)
    (line,) = said
    return fits, line


def test_what_fits_is_kept_and_what_does_not_is_computed_again(tmp_path: Path) -> None:
    config = make_config("llama")
    model = AutoModelForCausalLM.from_config(config)
    attach(model, "fused")
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    held = count(config, 3, length=64) * 1.2  # in a CPU's heap
    enough = int(held / 0.8) + weights + 3 * trained + 2
    assert decide(tmp_path, enough, config) == (
        False,
        f"activations: {held / 1e9:.1f} GB for 3 x 64 tokens, 0.0 GB free: no gradient checkpointing",
    )
    assert decide(tmp_path, enough - 10, config)[0]
    needed, said = decide(tmp_path, 0, config)
    assert needed
    assert said.endswith("0.0 GB free: gradient checkpointing")


def test_what_is_unknown_or_cannot_be_counted_means_checkpointing(tmp_path: Path) -> None:
    assert decide(tmp_path, None, make_config("llama")) == (
        True,
        "free memory of cpu is unknown: gradient checkpointing",
    )
    sparse = MixtralConfig(  # which expert gets which token depends on values
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, vocab_size=VOCABULARY, experts_implementation="eager", **SPECIAL,
    )  # fmt: skip
    needed, said = decide(tmp_path, 2**50, sparse)
    assert needed
    assert said.startswith("activations cannot be counted (")
    assert said.endswith("): gradient checkpointing")
    assert "\n" not in said


def test_free_memory_is_what_the_kernel_says_or_unknown() -> None:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    free = free_memory(CPU)
    assert free is not None
    assert total / 1000 < free < total
    assert free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 5\ninactive_file 200\n"}, 500),
        ({"memory.max": "max\n", "memory.current": "700\n", "memory.stat": "inactive_file 200\n"}, None),
        (
            {
                "memory.limit_in_bytes": "1000",
                "memory.usage_in_bytes": "700",
                "memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            500,
        ),
        ({}, None),
    ],
)
def test_a_control_group_leaves_its_limit_less_what_is_used_and_cannot_go(
    files: dict[str, str], left: int | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert left_to_cgroup(tmp_path) == left
