"""The plan of an adapter says which back end trains it; the settings stay as they were given."""

from pathlib import Path

import pytest

from plainlora.settings.programs import SFT
from plainlora.tasks import sft


@pytest.mark.parametrize(
    ("field", "backend"),
    [("{}", "fused"), ('{"use_dora": true}', "fused"), ('{"init_lora_weights": "pissa"}', "peft_fused")],
)
def test_the_plan_carries_the_back_end_and_the_settings_are_left_alone(
    field: str, backend: str, model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    settings = SFT.parse([
        *("--model_name_or_path", str(model_dirs["llama"]), "--dataset_name", str(rows_file), "--lora_config", field),
        *("--output_dir", str(tmp_path / "out"), "--lora_target_modules", "q_proj", "--use_cpu", "true"),
    ])  # fmt: skip
    plan = sft.plan_adapter(settings, sft.read_config(settings))
    assert plan.backend == backend
    assert settings.recipe.lora_backend == "fused"
    assert len(plan.notes) == (backend != "fused")
