"""The counted floor: as many FLOPs as a fused step's products have, in the steps that the trainer takes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.case import Case
from benchmarks.counting import count
from benchmarks.floor import count_step, products
from benchmarks.interleave import time_interleaved
from benchmarks.language import CONFIGS, plan_run, random_base, step_documents
from plainlora.backends import BACKENDS

TRAINING = {"gradient_checkpointing": False, "bf16": False}
LEAN: dict[str, Any] = {"size": "tiny", "r": 4, "length": 64, "base_dropout": 0.0, "training": TRAINING}


def attention_of(config: Any, documents: list[int]) -> int:
    width, layers = config.hidden_size, config.num_hidden_layers
    return layers * sum(6 * width * n * (n + 1) for n in documents)


@pytest.mark.parametrize("model", ["gpt2", "qwen2", "smollm2"])
def test_the_formula_counts_the_products_of_a_fused_step(model: str, tmp_path: Path) -> None:
    """All but attention's, which PyTorch's counter does not know."""
    plan = plan_run(LEAN | {"model": model, "backend": "fused"}, "cpu", str(tmp_path))
    fused: Any = BACKENDS["fused"].attach(random_base(plan), copy.deepcopy(plan.lora)).train()
    ids = torch.randint(2, 257, (1, 64))
    counted = count(lambda: fused(input_ids=ids, logits_to_keep=slice(0, 63)).logits, fused.parameters())["FLOPs"]
    expected = count_step(plan.config, 4, [64]) - attention_of(plan.config, [64])
    assert counted == expected


def test_attention_grows_with_the_square_of_each_document_and_all_else_with_tokens() -> None:
    config = CONFIGS["gpt2"](True)
    whole, parts = (count_step(config, 2, documents) for documents in ([1024], [256] * 4))
    head = 4 * 768 * 50257
    assert whole - parts == 3 * head + attention_of(config, [1024]) - attention_of(config, [256] * 4)
    blocks, first = 12 * 12 * 768**2, 768 * 3 * 768  # what the first c_attn passes on is left out
    adapters = 6 * 2 * 12 * ((768 + 2304) + (768 + 768) + 2 * (768 + 3072)) - 2 * 2 * 768
    assert whole == 1024 * (4 * blocks - 2 * first + adapters) + 1023 * head + attention_of(config, [1024])


def test_every_product_of_the_blocks_is_measured_both_ways() -> None:
    run = products(CONFIGS["qwen2"](False), 8, torch.bfloat16, "cpu")
    # Of width 64: q and o 64 x 64, k and v 64 x 64, gate and up 64 x 128, down 128 x 64.
    assert sorted(product() for product in run) == sorted(2 * [2 * 8 * 64 * 64] + 4 * [2 * 8 * 64 * 128])


@pytest.mark.parametrize("rows", [{"packed": True}, {"drawn": True, "batch": 4}])
def test_the_floor_takes_the_same_steps_as_the_trainer(rows: dict[str, Any]) -> None:
    options = LEAN | rows | {"model": "gpt2", "rows": "alpaca", "count": 16, "length": 512}
    case = Case("gpt2", "small", {form: {"backend": form} for form in ("fused", "floor")}, options)
    outcome = time_interleaved("language", case, "cpu", 2)
    steps = step_documents(options)
    assert len(steps) > 2
    facts = outcome.facts
    assert facts["fused"]["tokens"] == [sum(step) - len(step) for step in steps[:3]]
    config = CONFIGS["gpt2"](False)
    assert facts["floor"]["FLOPs"] == [count_step(config, 4, step) for step in steps[:3]]
    seconds = [flops / rate for flops, rate in zip(facts["floor"]["FLOPs"], facts["floor"]["FLOP/s"], strict=True)]
    assert outcome.seconds["floor"] == seconds[1:]
    assert "peak" not in facts["floor"]
