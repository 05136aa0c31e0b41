"""What servers refuse of an adapter is said with its own numbers, and what they take gets the exact command."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from plainlora.export.servers import Served, describe_servers
from plainlora.lora.delta import Delta


def served(r: int = 16, model_type: str = "llama", layers: int = 2, adapted: int = 2, **options: Any) -> Served:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(adapted)]
    deltas = {name: Delta(torch.zeros(r, 8), torch.zeros(8, r), 2.0) for name in names}
    return Served(Path("runs/my adapter"), "org/base", model_type, layers, LoraConfig(r=r, **options), deltas)


@pytest.mark.parametrize(("rank", "allowed"), [(2, 8), (8, 8), (9, 16), (64, 64), (300, 320), (512, 512)])
def test_vllm_gets_the_smallest_rank_that_it_allows(rank: int, allowed: int) -> None:
    text = describe_servers(served(rank), template=True)
    assert f"vllm serve org/base --enable-lora --max-lora-rank {allowed} --lora-modules 'my adapter'=" in text
    assert "/chat_template.jinja" in text
    assert f"my adapter: rank {rank} in 2 modules" in text


def test_the_revision_of_the_base_is_in_every_command_that_names_it() -> None:
    text = describe_servers(replace(served(), revision="v1.0"), template=False)
    assert "vllm serve org/base --revision v1.0 --enable-lora" in text
    assert "--model-id org/base --revision v1.0" in text
    assert "--revision" not in describe_servers(served(), template=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 513}, "rank 513, above the 512 that --max-lora-rank allows"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"model_type": "gpt2"}, "it adapts no gpt2 models"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern, which is not read"),
    ],
)
def test_vllm_s_constraints_are_checked_and_the_merged_model_is_the_way_out(
    options: dict[str, Any], says: str
) -> None:
    text = describe_servers(served(**options), template=False)
    assert f"# vLLM cannot serve this adapter on its base: {says}" in text
    merge = text.splitlines()[3]
    assert merge == "plainlora merge --adapter 'runs/my adapter' --output 'runs/my adapter-merged'"
    assert "vllm serve 'runs/my adapter-merged'" in text
    assert "--enable-lora" not in text


@pytest.mark.parametrize(
    ("options", "says"),
    [({"r": 4}, "rank 4, which is padded"), ({"adapted": 1}, "q_proj of some layers only, and then of none")],
)
def test_tgi_s_own_constraints_are_checked(options: dict[str, Any], says: str) -> None:
    text = describe_servers(served(**options), template=False)
    assert f"# Text Generation Inference cannot serve this adapter on its base: {says}" in text
    assert "vllm serve org/base --enable-lora" in text


def test_tgi_gets_the_adapter_by_its_name() -> None:
    text = describe_servers(served(), template=False)
    place = Path("runs/my adapter").resolve()
    assert f"LORA_ADAPTERS='my adapter'='{place}' text-generation-launcher --model-id org/base" in text
