"""An adapter goes onto the base it was trained on, or it is said what is different."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from plainlora.base.identity import describe_base, name_base
from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from plainlora.report import write_json
from plainlora.run.adapter_base import Base, find_base
from tests.base.test_identity import flip
from tests.conftest import CONFIGS, make_model
from tests.merging.test_merge import trained_adapter


@pytest.fixture
def base(tmp_path: Path, model_dirs: dict[str, Path]) -> Path:
    """A base that may be changed."""
    return shutil.copytree(model_dirs["llama"], tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """An adapter that knows its base, as a recipe leaves it."""
    folder = trained_adapter("llama", {"llama": base}, tmp_path / "adapter")
    write_json(folder / "run.json", {"quantization_config": None, "base": describe_base(str(base))})
    return folder


def test_u03_the_same_base_says_nothing(adapter: Path, base: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base, tmp_path / "moved")
    for found in (find_base(adapter), find_base(adapter, str(moved))):
        assert found.warning is None
    assert find_base(adapter, str(moved)).name == str(moved)
    shutil.rmtree(base)
    with pytest.raises(
        UserError, match="which is not a folder here; run from where it was trained, or give --base_model"
    ):
        find_base(adapter)


def test_u03_a_bit_flipped_after_training_is_seen(adapter: Path, base: Path) -> None:
    trained = describe_base(str(base))
    flip(base / "model.safetensors", -1)
    with pytest.raises(UserError, match="holds other weights of the same shapes") as raised:
        find_base(adapter)
    assert all(name_base(each) in str(raised.value) for each in (trained, describe_base(str(base))))
    assert "; give the base it was trained on with --base_model, or continue with --allow_other_base" in str(
        raised.value
    )
    warning = find_base(adapter, allow_other_base=True).warning
    assert warning is not None
    assert "holds other weights of the same shapes" in warning


def test_u03_another_architecture_is_refused_whatever_is_allowed(adapter: Path, model_dirs: dict[str, Path]) -> None:
    for allowed in (False, True):
        with pytest.raises(UserError, match="is another architecture; give the base it was trained on") as raised:
            find_base(adapter, str(model_dirs["qwen2"]), allowed)
        assert "allow_other_base" not in str(raised.value)


def test_u03_other_shapes_are_refused(adapter: Path, tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "shallow")
    with pytest.raises(UserError, match="has other tensors or shapes; give the base"):
        find_base(adapter, str(tmp_path / "shallow"))


def test_u03_the_same_base_in_half_precision_is_a_warning(adapter: Path, tmp_path: Path) -> None:
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    warning = find_base(adapter, str(tmp_path / "half")).warning
    assert warning is not None
    assert "(llama, F32, " in warning
    assert "(llama, BF16, " in warning
    assert "the same in another precision" in warning


def test_an_adapter_of_elsewhere_has_nothing_to_compare(adapter: Path, model_dirs: dict[str, Path]) -> None:
    (adapter / "run.json").unlink()
    name = str(model_dirs["qwen2"])
    assert find_base(adapter, name) == Base(name, None)


@pytest.mark.parametrize(
    "quantization", [{"load_in_4bit": "x"}, {"bnb_4bit_compute_dtype": "system"}, {"bnb_4bit_compute_dtype": "nn"}]
)
def test_a_damaged_record_of_the_quantisation(adapter: Path, quantization: dict[str, object]) -> None:
    write_json(adapter / "run.json", {"quantization_config": quantization})
    with pytest.raises(UserError, match=r"run.json is damaged \(its quantization_config is not valid: "):
        find_base(adapter)


def test_a_damaged_commit_of_the_base(adapter: Path) -> None:
    described = json.loads((adapter / "run.json").read_text())["base"]
    described |= {"commit": 5, "weights": "0"}
    write_json(adapter / "run.json", {"quantization_config": None, "base": described})
    with pytest.raises(UserError, match=r"run.json is damaged \(its base is not a description of one\)"):
        find_base(adapter)


@pytest.mark.parametrize("damaged", [4, [], {}, {"name": "a"}, "llama"])
def test_a_damaged_record_of_the_base(adapter: Path, damaged: object) -> None:
    (adapter / "run.json").write_text(json.dumps({"quantization_config": None, "base": damaged}))
    with pytest.raises(UserError, match=r"run.json is damaged \(its base is not a description of one\)"):
        find_base(adapter)


def test_an_adapter_that_does_not_fit_is_refused_before_a_weight_is_loaded(
    adapter: Path, base: Path, model_dirs: dict[str, Path]
) -> None:
    (adapter / "run.json").unlink()  # as an adapter of elsewhere
    (base / "model.safetensors").unlink()
    assert find_base(adapter).name == str(base)
    with pytest.raises(LoRAError, match=r"has shape .* the model needs|names a module of this"):
        find_base(adapter, str(model_dirs["gpt2"]))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(LoRAError, match=r"lacks .*lora_magnitude_vector"):
        find_base(adapter)
