"""Under ZeRO-3 a step sends what the doctor counts: no weight is gathered twice that could have stayed."""

import importlib
from pathlib import Path

import pytest

measuring = importlib.import_module("docs.several-devices.measure")
SHAPE = measuring.WIDE | {"num_hidden_layers": 2}  # its matrices are large enough for ZeRO-3 to shard them


@pytest.mark.integration
def test_zero3_sends_what_is_counted(tmp_path: Path) -> None:
    """The base is examined, and so run forward alone, before the first step."""
    measuring.make_base(tmp_path / "base", SHAPE)
    words = ["--model_name_or_path", str(tmp_path / "base"), "--max_steps", "4", "--save_strategy", "no"]
    words += ["--per_device_train_batch_size", "1", "--gradient_checkpointing", "false", "--precision", "fp32"]
    words += ["--eval_strategy", "no", "--merge", "false", "--exact_match_rows", "0"]
    words += ["--output_dir", str(tmp_path / "run")]
    found = str(tmp_path / "found.json")
    measuring.launch(tmp_path, "ZeRO-3", 2, [(["--config", measuring.RECIPE, *words], found)])
    counted = measuring.count(words, 2, "ZeRO-3")["sent"]
    assert measuring.read(found, 2)["sent"] == pytest.approx(
        counted, rel=0.05
    )  # the checks of the last step gather the adapter
