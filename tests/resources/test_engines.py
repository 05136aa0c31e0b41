"""What each engine holds and sends is what PyTorch and DeepSpeed hold and send of models this small."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from plainlora.resources.devices import Devices
from plainlora.resources.engines import MAX_REUSE_DISTANCE, REDUCE_BUCKET, DevicesNeed, EngineNeed
from plainlora.resources.footprint import estimate
from tests.conftest import CONFIGS
from tests.resources.plans import make_plan, settings

WIDTH, INNER, LAYERS, WORDS, R = 64, 128, 3, 100, 4
BLOCK = 4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH
ADAPTER = LAYERS * R * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))  # all-linear
FP32 = 4


def llama(**sizes: int | bool) -> LlamaConfig:
    plain = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    return LlamaConfig(**plain | {"num_attention_heads": 4, "tie_word_embeddings": False} | sizes, pad_token_id=0)


def plan(config: LlamaConfig, folder: Path, count: int, memory: float = 24e9, **options: object) -> DevicesNeed:
    model = options.pop("model", {})
    training = settings(folder, gradient_checkpointing=options.pop("gradient_checkpointing", False), **options)
    need = estimate(make_plan(config, training, model=model), Devices(count, int(memory))).devices
    assert need is not None
    return need


def by_name(need: DevicesNeed) -> dict[str, EngineNeed]:
    return {engine.engine: engine for engine in need.engines}


def test_every_total_is_the_sum_of_its_parts_and_the_base_is_divided(tmp_path: Path) -> None:
    parts = ("weights", "gathered", "adapters", "gradients", "buckets", "optimizer", "activations", "margin")
    single = plan(llama(), tmp_path, 1).engines[0]
    for count in (2, 4):
        need = by_name(plan(llama(), tmp_path, count))
        assert list(need) == ["DDP", "ZeRO-2", "FSDP2", "ZeRO-3"]
        for engine in need.values():
            assert engine.total == sum(getattr(engine, part) for part in parts)
        whole = need["DDP"].weights
        buffers = whole - FP32 * (LAYERS * BLOCK + 2 * WORDS * WIDTH + WIDTH)
        assert need["ZeRO-2"].weights == whole == single.weights
        for name in ("FSDP2", "ZeRO-3"):
            assert need[name].weights - buffers == pytest.approx((whole - buffers) / count, abs=100)
        assert need["DDP"].total == (single.total or 0) + FP32 * ADAPTER  # the reducer's buckets
        assert need["ZeRO-2"].buckets == FP32 * REDUCE_BUCKET


def test_fsdp2_gathers_two_blocks_beside_the_tail(tmp_path: Path) -> None:
    tail = WORDS * WIDTH + WIDTH
    assert by_name(plan(llama(), tmp_path, 2))["FSDP2"].gathered == FP32 * (2 * BLOCK + tail)
    many = 4000  # the tail is larger than two blocks
    found = by_name(plan(llama(vocab_size=many, tie_word_embeddings=True), tmp_path, 2))["FSDP2"]
    assert found.gathered == FP32 * 2 * (many * WIDTH + WIDTH)


@pytest.mark.parametrize("count", [2, 4])
def test_what_is_sent_is_what_a_ring_sends(count: int, tmp_path: Path) -> None:
    need, ring = by_name(plan(llama(), tmp_path, count)), (count - 1) / count
    base = LAYERS * BLOCK + 2 * WORDS * WIDTH + WIDTH
    assert need["DDP"].sent == int(2 * ring * FP32 * ADAPTER)
    assert need["ZeRO-2"].sent == int(3 * ring * FP32 * ADAPTER)
    assert need["FSDP2"].sent == int(ring * FP32 * (2 * base - WORDS * WIDTH - WIDTH + 2 * ADAPTER))
    twice = by_name(plan(llama(), tmp_path, count, gradient_accumulation_steps=2))
    assert twice["DDP"].sent == need["DDP"].sent
    assert twice["FSDP2"].sent - need["FSDP2"].sent == int(ring * FP32 * (2 * base - WORDS * WIDTH - WIDTH))


def test_only_the_adapter_is_sent_however_large_the_base(tmp_path: Path) -> None:
    small, large = (by_name(plan(llama(vocab_size=words), tmp_path, 2)) for words in (WORDS, 100 * WORDS))
    for engine in ("DDP", "ZeRO-2"):
        assert small[engine].sent == large[engine].sent
    for engine in ("FSDP2", "ZeRO-3"):
        assert small[engine].sent < large[engine].sent


def test_a_base_in_four_bits_is_divided_by_zero3_alone(tmp_path: Path) -> None:
    four = {"load_in_4bit": True}
    need = by_name(plan(llama(), tmp_path, 4, model=four))
    dense = FP32 * (2 * WORDS * WIDTH + WIDTH + LAYERS * 2 * WIDTH)
    assert need["DDP"].weights - need["FSDP2"].weights == pytest.approx(dense * 3 / 4, abs=100)
    assert need["ZeRO-3"].weights < need["FSDP2"].weights
    floating = by_name(plan(llama(), tmp_path, 4, model=four | {"bnb_4bit_quant_storage": "bfloat16"}))
    assert floating["FSDP2"].weights == pytest.approx(need["ZeRO-3"].weights, abs=100)
    assert need["DDP"].gathered == FP32 * WIDTH * INNER  # the one weight that is made dense


def test_deepspeed_stores_what_mixed_precision_computes_in(tmp_path: Path) -> None:
    full, half = (by_name(plan(llama(), tmp_path, 2, bf16=bf16)) for bf16 in (False, True))
    assert half["DDP"].weights == full["DDP"].weights
    for engine in ("ZeRO-2", "ZeRO-3"):
        assert half[engine].weights == pytest.approx(full[engine].weights / 2, rel=0.01)
        assert half[engine].sent == full[engine].sent // 2
        assert half[engine].buckets == full[engine].buckets // 2
    assert half["FSDP2"].gathered == full["FSDP2"].gathered // 2
    assert half["ZeRO-3"].optimizer - full["ZeRO-3"].optimizer == FP32 * ADAPTER // 2  # master copies


def test_the_first_engine_that_fits_is_chosen(tmp_path: Path) -> None:
    config = llama(num_hidden_layers=12)
    need = by_name(plan(config, tmp_path, 4))
    ddp, sharded = need["DDP"].total or 0, need["FSDP2"].total or 0
    assert sharded < ddp
    for memory, choice in ((ddp, "ddp.yaml"), (ddp - 1, "fsdp2.yaml"), (sharded - 1, None)):
        found = plan(config, tmp_path, 4, memory)
        assert found.choice == choice
        assert [engine.fits for engine in found.engines] == [(e.total or 0) <= memory for e in found.engines]
    alone = plan(config, tmp_path, 1, ddp)
    assert (alone.choice, [engine.sent for engine in alone.engines]) == ("single_gpu.yaml", [0])


def test_activations_are_computed_again_where_the_whole_base_leaves_no_room(tmp_path: Path) -> None:
    roomy = plan(llama(), tmp_path, 2, gradient_checkpointing=None)
    assert not roomy.checkpointing
    tight = plan(llama(), tmp_path, 2, 2e6, gradient_checkpointing=None)
    assert tight.checkpointing
    assert (tight.engines[0].activations or 0) < (roomy.engines[0].activations or 0)


def test_tokens_of_a_step_are_those_of_all_devices(tmp_path: Path) -> None:
    # 40 rows of 30 tokens, two a device and batch
    assert plan(llama(), tmp_path, 4).tokens_per_step == 4 * 2 * 30
    assert plan(llama(), tmp_path, 4, gradient_accumulation_steps=3).tokens_per_step == 3 * 4 * 2 * 30
    assert plan(llama(), tmp_path, 64).tokens_per_step == 1200  # there are no more


def test_zero3_keeps_what_is_used_again_soon_and_small_weights(tmp_path: Path) -> None:
    need = by_name(plan(llama(), tmp_path, 4))["ZeRO-3"]
    assert need.gathered == FP32 * (LAYERS * BLOCK + 2 * WORDS * WIDTH + WIDTH + ADAPTER)  # all of so little
    assert need.sent == int(0.75 * FP32 * 2 * ADAPTER)  # gradients scattered, weights gathered after the step
    large = by_name(plan(llama(vocab_size=20_000_000), tmp_path, 4))["ZeRO-3"]
    words = 20_000_000 * WIDTH
    kept = MAX_REUSE_DISTANCE // 2
    assert large.gathered == pytest.approx(FP32 * min(2 * words, kept + 2 * words), rel=0.01)
    assert large.sent == pytest.approx(0.75 * FP32 * (4 * words - kept), rel=0.01)


def test_it_is_told_as_json(tmp_path: Path) -> None:
    footprint = estimate(make_plan(CONFIGS["gpt2"](), settings(tmp_path)), Devices(2, 10**9))
    told = json.loads(json.dumps(footprint.to_dict()))
    assert told == footprint.to_dict()
    assert told["devices"]["engines"][0]["config"] == "ddp.yaml"
    assert replace(footprint, devices=None).to_dict()["devices"] is None
