"""The fields of `LoraConfig` that a recipe gives in `lora_config`."""

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from plainlora import inject
from plainlora.lora.errors import LoRAError
from plainlora.lora.record import lora_layers
from plainlora.settings.programs import SFT
from plainlora.tasks import sft
from tests.conftest import make_model


@pytest.mark.parametrize("pattern", ["layers", "blocks"])
def test_the_layers_pattern_of_lora_config_selects_what_peft_selects_or_is_refused(
    pattern: str, model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    settings = SFT.parse([
        *("--model_name_or_path", str(model_dirs["llama"]), "--dataset_name", str(rows_file), "--use_cpu", "true"),
        *("--output_dir", str(tmp_path / "out"), "--lora_target_modules", "q_proj", "v_proj"),
        *("--lora_layers_to_transform", "1", "--lora_config", f'{{"layers_pattern": "{pattern}"}}'),
    ])  # fmt: skip
    lora = sft.plan_adapter(settings, sft.read_config(settings)).lora
    assert isinstance(lora, LoraConfig)
    assert lora.layers_pattern == pattern
    if pattern == "blocks":
        with pytest.raises(LoRAError, match=r"in layer 1; they lie in no layer"):
            inject(make_model("llama"), lora)
        return
    expected = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern=pattern)
    theirs = get_peft_model(make_model("llama"), expected).targeted_module_names
    ours = [name for name, _ in lora_layers(inject(make_model("llama"), lora))]
    assert sorted(ours) == sorted(theirs) == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
