"""The variants of a language model: one recipe, one base and one precision on both sides."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.case import Case
from benchmarks.interleave import time_interleaved
from benchmarks.language import CONFIGS, plan_run, random_base, row_lengths

LLAMA2: dict[str, Any] = {"model": "llama2", "size": "tiny", "r": 8, "p": 0.1, "nf4": True, "length": 32, "batch": 4}
TRAINING = {"gradient_checkpointing": True, "bf16": False, "learning_rate": 1e-3}


def test_both_variants_of_a_quantised_base_train_fp32_adapters_to_the_same_losses() -> None:
    """SFTTrainer by itself would cast PEFT's adapter to bf16."""
    variants = {form: {"backend": form, "training": TRAINING} for form in ("fused", "peft")}
    case = Case("llama2", "small", variants, LLAMA2 | {"rows": "guanaco", "count": 16})
    facts = time_interleaved("language", case, "cpu", 4).facts
    assert facts["fused"]["trained in"] == facts["peft"]["trained in"] == ["float32"]
    assert facts["fused"]["tokens"] == facts["peft"]["tokens"]
    ours, theirs = facts["fused"]["losses"], facts["peft"]["losses"]
    assert len(ours) == 5
    assert len({round(loss, 4) for loss in ours}) > 1
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_each_step_counts_what_it_predicts_and_batches_are_grouped_by_length() -> None:
    """As Transformers' own sampler groups them."""
    variants = {"fused": {"backend": "fused", "training": TRAINING}}
    options = LLAMA2 | {"rows": "guanaco", "count": 12, "length": 1024}
    facts = time_interleaved("language", Case("llama2", "small", variants, options), "cpu", 2).facts
    lengths = row_lengths(options)
    assert facts["fused"]["tokens"] == [sum(lengths[start : start + 4]) - 4 for start in (0, 4, 8)]
    grouped = get_length_grouped_indices(lengths, 4, mega_batch_mult=50)
    assert lengths == [lengths[row] for row in grouped]
    assert lengths[0] == max(lengths) > 800


def test_a_quantised_base_is_what_its_checkpoint_would_give_and_leaves_nothing_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LLAMA2 | {"backend": "fused", "training": TRAINING}
    plan = plan_run(options, "cpu", str(tmp_path))
    random_base(replace(plan, model_args=replace(plan.model_args, load_in_4bit=False))).save_pretrained(tmp_path)
    stored = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=plan.quantization
    ).state_dict()
    dense = CONFIGS["llama2"](False).intermediate_size, CONFIGS["llama2"](False).hidden_size
    left: list[int] = []

    def count_dense() -> None:
        left.append(sum(isinstance(each, torch.Tensor) and each.shape == dense for each in gc.get_objects()))

    monkeypatch.setattr(torch.cuda, "empty_cache", count_dense)
    gc.collect()  # what other tests left
    for _ in range(2):
        base = random_base(plan).state_dict()
        assert base.keys() == stored.keys()
        assert all(torch.equal(base[name], stored[name]) for name in base)
    assert left == [0, 0]
