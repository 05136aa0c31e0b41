"""What is counted does not vary from run to run, so that targets can be held to it."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from benchmarks.counting import count
from benchmarks.head import make_model
from plainlora import inject
from plainlora.fast.fuse import fuse
from plainlora.fast.head import CHUNK
from plainlora.fast.loss_head import LossHead
from tests.conftest import CONFIGS, fused_in_place, random_ids
from tests.conftest import make_model as make_base

TOKENS, D_IN, D_OUT, R = 256, 768, 1024, 8
FLOAT = 4  # bytes


def count_layer(form: str, p: float) -> dict[str, int]:
    model: Any = nn.ModuleDict({"layer": nn.Linear(D_IN, D_OUT).requires_grad_(False)})
    config = LoraConfig(r=R, lora_alpha=16, lora_dropout=p, target_modules=["layer"])
    model = get_peft_model(model, config).get_base_model() if form == "peft" else inject(model, config)
    if form == "fused":
        fuse(model)
    layer = model.train().layer
    x = torch.randn(1, TOKENS, D_IN, requires_grad=True)
    return count(lambda: layer(x), model.parameters())


def test_the_fused_layer_keeps_its_input_a_byte_an_element_of_the_mask_and_the_activation_of_rank_r() -> None:
    rank_r = TOKENS * R * FLOAT
    assert count_layer("fused", 0.0)["saved bytes"] == TOKENS * D_IN * FLOAT + rank_r
    assert count_layer("fused", 0.1)["saved bytes"] == TOKENS * D_IN * (FLOAT + 1) + rank_r


def test_a_layer_keeps_at_most_0_63_of_pefts_bytes_with_dropout_and_no_more_without() -> None:
    assert count_layer("fused", 0.1)["saved bytes"] / count_layer("peft", 0.1)["saved bytes"] <= 0.63
    assert count_layer("fused", 0.0)["saved bytes"] <= count_layer("peft", 0.0)["saved bytes"]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_layer_multiplies_no_more_than_peft_in_fewer_operations(p: float) -> None:
    fused, peft = count_layer("fused", p), count_layer("peft", p)
    # Two products with W0, two and four with A and B, of 2 N d_in d_out operations or of rank r.
    assert fused["FLOPs"] == 4 * TOKENS * D_IN * D_OUT + 6 * TOKENS * R * (D_IN + D_OUT) == peft["FLOPs"]
    assert fused["operations"] < peft["operations"]
    assert fused["tensor bytes"] < peft["tensor bytes"]


def count_head(form: str, tokens: int = 512, d: int = 16, vocabulary: int = 50_257) -> dict[str, int]:
    model = make_model(d, vocabulary)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if form == "fused":
        LossHead(model).with_statistics = False
    hidden = torch.randn(1, tokens, d, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens))

    def run() -> torch.Tensor:
        return model(inputs_embeds=hidden, labels=labels, fused_lm_head=True).loss

    return count(run, [*model.parameters(), hidden, labels])


def test_the_head_multiplies_twice_where_trls_multiplies_three_times() -> None:
    one_product = 2 * 511 * 16 * 50_257  # the last token has no label
    assert count_head("fused")["FLOPs"] == 2 * one_product
    assert count_head("trl")["FLOPs"] >= 3 * one_product


def test_the_head_holds_one_chunk_of_logits_and_at_most_a_tenth_of_trls() -> None:
    chunk = CHUNK * 50_257 * FLOAT
    fused = count_head("fused")["tensor bytes"]
    assert chunk <= fused < 1.1 * chunk
    assert fused / count_head("trl")["tensor bytes"] <= 0.10


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_whole_model_keeps_less(kind: str) -> None:
    kept = []
    for attach in (lambda *a: fused_in_place(inject(*a)), get_peft_model):
        model = attach(make_base(kind), LoraConfig(target_modules="all-linear", lora_dropout=0.1)).train()
        ids = random_ids()
        kept.append(count(lambda m=model, i=ids: m(input_ids=i).logits.sum(), model.parameters())["saved bytes"])
    assert kept[0] < kept[1]
