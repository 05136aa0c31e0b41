"""What needs the base's whole weights is refused on engines that shard them, before they are loaded."""

from pathlib import Path

import pytest

from tests.engines.matrix import Launch, carry_out

ENGINES = {"fsdp2": "FSDP2", "deepspeed_zero3": "ZeRO-3"}
ADAPTERS = {
    "use_dora": ("--use_dora", "true"),
    "init_lora_weights": ("--lora_config", '{"init_lora_weights": "pissa"}'),
}


@pytest.mark.integration
@pytest.mark.parametrize("field", ADAPTERS)
@pytest.mark.parametrize("config", ENGINES)
def test_what_computes_with_whole_weights_is_refused_where_they_are_sharded(
    config: str, field: str, tmp_path: Path
) -> None:
    said = carry_out(Launch("run", config, 2, 40, ("--max_steps", "1", *ADAPTERS[field])), tmp_path)
    assert said == (
        f"refused: {field}: {ENGINES[config]} shards the base's weights, which this adapter computes with; use "
        "accelerate_configs/ddp.yaml"
    )


@pytest.mark.integration
@pytest.mark.parametrize("method", ["full", "last_layers"])
@pytest.mark.parametrize("config", ENGINES)
def test_a_method_that_trains_the_bases_own_weights_is_refused(config: str, method: str, tmp_path: Path) -> None:
    said = carry_out(Launch("run", config, 2, 40, ("--max_steps", "1", "--method", method)), tmp_path)
    assert said == (
        f"refused: method {method}: {ENGINES[config]} shards the base's weights, which this method trains; use "
        "accelerate_configs/ddp.yaml, or method lora"
    )
