"""A run goes on from a saved adapter: whose it may be, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from plainlora.run.parent import Parent, find_parent
from tests.conftest import make_model

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


@pytest.fixture
def by_peft(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter that PEFT saved, with values of its own."""
    model = make_model("llama")
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": str(model_dirs["llama"])}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(named))
    return tmp_path / "adapter"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_of_pefts_is_gone_on_from(backend: str, by_peft: Path, model_dirs: dict[str, Path]) -> None:
    parent = find_parent(str(by_peft), str(model_dirs["llama"]), None)
    assert (parent.config.r, parent.config.lora_alpha, parent.config.inference_mode) == (3, 5, False)
    model = attach_adapter(make_model("llama"), parent.config, BACKENDS[backend])
    BACKENDS[backend].reload(model, parent.folder)
    saved = load_file(by_peft / "adapter_model.safetensors")
    trained = {
        name.replace(".default", "").removeprefix("base_model.model."): value
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    assert len(trained) == len(saved) == 4
    for name, value in saved.items():
        assert torch.equal(trained[name.removeprefix("base_model.model.")], value)


def test_the_record_names_it_and_its_bytes(by_peft: Path, model_dirs: dict[str, Path]) -> None:
    parent = find_parent(str(by_peft), str(model_dirs["llama"]), None)
    assert parent.describe()["name"] == str(by_peft)
    assert len(parent.describe()["sha256"]) == 64
    line = parent.line(LoraConfig(r=16, lora_alpha=5, target_modules=["q_proj"]))
    assert line == f"goes on from the adapter {by_peft}; it keeps its own r 3 (the recipe: 16)"


@pytest.mark.parametrize(
    ("field", "theirs", "ours", "said"),
    [
        ("bias", "all", "none", "bias all (the recipe: none)"),
        ("lora_bias", True, False, "lora_bias True (the recipe: False)"),
        ("trainable_token_indices", [5, 6], None, "trainable_token_indices [5, 6] (the recipe: none)"),
        ("trainable_token_indices", None, [5], "trainable_token_indices none (the recipe: [5])"),
        ("exclude_modules", None, "v_.*", "exclude_modules none (the recipe: v_.*)"),
        ("lora_dropout", 0.1, 0.0, "lora_dropout 0.1 (the recipe: 0.0)"),
        ("modules_to_save", [], None, None),
        ("fan_in_fan_out", True, False, None),  # PEFT finds it out
        ("target_modules", ["q_proj"], "all-linear", None),
        ("target_modules", ["q_proj"], None, None),
    ],
)
def test_the_log_names_every_setting_of_the_recipe_that_differs(
    field: str, theirs: Any, ours: Any, said: str | None
) -> None:
    common = {"target_modules": ["q_proj"]}
    own, recipe = (LoraConfig(**common | {field: value}) for value in (theirs, ours))
    line = Parent("a", Path("a"), own).line(recipe)
    assert line == "goes on from the adapter a" + (f"; it keeps its own {said}" if said else "")


def test_another_base_is_refused(by_peft: Path, model_dirs: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"names the base .*llama\d*, not .*qwen2\d*; give --model_name_or_path"
    ) as caught:
        find_parent(str(by_peft), str(model_dirs["qwen2"]), None)
    assert "\n" not in str(caught.value)


def test_a_copy_of_the_base_may_lie_elsewhere(by_peft: Path, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(model_dirs["llama"], tmp_path / "copy")
    with pytest.raises(UserError, match=r"correct base_model_name_or_path in its adapter_config\.json"):
        find_parent(str(by_peft), str(copy), None)
    config = json.loads((by_peft / "adapter_config.json").read_text())
    (by_peft / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(copy)}))
    assert find_parent(str(by_peft), str(copy), None).config.r == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "adapter_name_or_path: there is no folder /no/such/folder"),
        (
            "somebody/adapter",
            "somebody/adapter is neither a folder here nor an adapter that can be loaded",
        ),
    ],
)
def test_what_cannot_be_found_is_one_line(name: str, message: str, model_dirs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        find_parent(name, str(model_dirs["llama"]), None)
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    with pytest.raises(LoRAError, match=r"adapter_config\.json"):
        find_parent(str(tmp_path), str(model_dirs["llama"]), None)


def test_a_base_that_cannot_be_made_again_is_refused(by_peft: Path, model_dirs: dict[str, Path]) -> None:
    config = json.loads((by_peft / "adapter_config.json").read_text())
    (by_peft / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(LoRAError, match="for a changed base that PEFT cannot make again"):
        find_parent(str(by_peft), str(model_dirs["llama"]), None)
