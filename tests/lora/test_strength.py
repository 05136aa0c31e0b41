"""An adapter's strength: 1 is what it was, 0 the base, 2 PEFT's model with alpha doubled, and all between."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from plainlora.backends import BACKENDS
from plainlora.lora.dora import DoRALinear
from plainlora.lora.errors import LoRAError
from plainlora.lora.record import lora_layers
from plainlora.lora.strength import scaled
from tests.conftest import make_model, random_ids
from tests.lora.oracle import save_peft_adapter

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "patterns": {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
}


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_ids()).logits


def with_alpha_times(adapter: str, factor: float, folder: Path) -> str:
    """A copy of an adapter whose alphas are multiplied."""
    folder.mkdir()
    for path in Path(adapter).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= factor
    config["alpha_pattern"] = {name: alpha * factor for name, alpha in config["alpha_pattern"].items()}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("backend", ["reference", "fused", "peft"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changes_nothing_and_zero_is_the_base(
    settings: str, backend: str, dtype: torch.dtype, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapter = save_peft_adapter(tmp_path / "adapter", model_dirs["llama"], **SETTINGS[settings])
    base = logits_of(make_model("llama", dtype))
    chosen = BACKENDS[backend]
    model = chosen.load(make_model("llama", dtype), adapter)
    tuned = logits_of(model)
    assert not torch.equal(tuned, base)
    with chosen.scaled(model, 1.0):
        assert torch.equal(logits_of(model), tuned)
    with chosen.scaled(model, 0.0):
        assert torch.equal(logits_of(model), base)
    assert torch.equal(logits_of(model), tuned)
    with pytest.raises(ZeroDivisionError), chosen.scaled(model, 0.5):
        _ = 1 / 0
    assert torch.equal(logits_of(model), tuned)


@pytest.mark.parametrize("backend", ["reference", "peft"])
@pytest.mark.parametrize("settings", ["lora", "patterns"])
def test_it_is_pefts_model_of_another_alpha(
    settings: str, backend: str, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapter = save_peft_adapter(tmp_path / "adapter", model_dirs["llama"], **SETTINGS[settings])
    chosen = BACKENDS[backend]
    model = chosen.load(make_model("llama"), adapter)
    for strength in (2.0, 0.5):
        doubled = with_alpha_times(adapter, strength, tmp_path / str(strength))
        theirs = logits_of(PeftModel.from_pretrained(make_model("llama"), doubled).eval())
        with chosen.scaled(model, strength):
            assert torch.equal(logits_of(model), theirs)
    assert not torch.equal(logits_of(model), theirs)


@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_of_dora_it_scales_the_change_of_the_weight(
    strength: float, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    """Held to a merge of `W0 + t dW` in fp64, dW from the layer's own `delta_weight`, which is held to PEFT's."""
    adapter = save_peft_adapter(tmp_path / "adapter", model_dirs["llama"], use_dora=True)
    dense = make_model("llama", torch.float64)
    model = BACKENDS["reference"].load(copy.deepcopy(dense), adapter)
    for name, layer in lora_layers(model):
        assert isinstance(layer, DoRALinear)
        with torch.no_grad():
            dense.get_submodule(name).weight += strength * layer.delta_weight()
    with scaled(model, strength):
        torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-6, atol=1e-9)
    by_peft = BACKENDS["peft"].load(make_model("llama", torch.float64), adapter)
    with BACKENDS["peft"].scaled(by_peft, strength):
        torch.testing.assert_close(logits_of(by_peft), logits_of(dense), rtol=1e-5, atol=1e-6)


def test_what_is_trained_whole_stays_as_it_was_trained(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    adapter = save_peft_adapter(tmp_path / "adapter", model_dirs["llama"], modules_to_save=["lm_head"])
    model = BACKENDS["reference"].load(make_model("llama"), adapter)
    with torch.no_grad():
        model.lm_head.trained_module.weight += 1
    head, base = model.lm_head.weight.clone(), make_model("llama")
    base.lm_head.weight = nn.Parameter(head)
    with scaled(model, 0.0):
        assert torch.equal(logits_of(model), logits_of(base))


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(LoRAError, match="carries no PlainLoRA adapter"), scaled(make_model("llama"), 0.5):
        pass
