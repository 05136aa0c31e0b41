"""Classes are compared in their order, however many there are. Whole runs: tests/recipes/test_resumption.py."""

from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig, SFTConfig

from plainlora.errors import UserError
from plainlora.report import write_json
from plainlora.run.resumption import check_same_settings


def settings(**options: Any) -> list[Any]:
    """TRL's dataclasses; an option goes to the one that has it."""
    own = {name: options.pop(name) for name in list(options) if name in SFTConfig.__dataclass_fields__}
    return [SFTConfig(output_dir="run", use_cpu=True, bf16=False, report_to="none", **own), ModelConfig(**options)]


def test_classes_are_the_same_in_their_order_only(tmp_path: Path) -> None:
    labels = [f"class number {number}" for number in range(100)]  # as one text, longer than a file may be called
    write_json(tmp_path / "run.json", {"quantization_config": None, "labels": labels})
    check_same_settings(tmp_path / "checkpoint-3", [], labels)
    with pytest.raises(UserError, match=r"was trained with labels .*; give the same settings"):
        check_same_settings(tmp_path / "checkpoint-3", [], labels[::-1])


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"max_length": 1024, "packing": True}, {"max_length": 2048, "packing": True}),
        ({"dataloader_drop_last": True}, {"dataloader_drop_last": False}),
        ({"model_revision": "main"}, {"model_revision": "other"}),
        ({"bnb_4bit_quant_type": "nf4"}, {"bnb_4bit_quant_type": "fp4"}),
        ({"use_bnb_nested_quant": False}, {"use_bnb_nested_quant": True}),
    ],
)
def test_what_would_train_other_rows_or_another_base_may_not_change(
    then: dict[str, Any], now: dict[str, Any], tmp_path: Path
) -> None:
    write_json(tmp_path / "run.json", {"quantization_config": None, "arguments": then})
    check_same_settings(tmp_path / "checkpoint-3", settings(**then))
    name = next(iter(then))
    with pytest.raises(UserError, match=f"was trained with {name} {then[name]}, now it is {now[name]}; give the same"):
        check_same_settings(tmp_path / "checkpoint-3", settings(**now))


def test_max_length_may_change_where_the_rows_stay_the_same(tmp_path: Path) -> None:
    """Rows that are not packed are compared as they were cut."""
    then = {"max_length": 1024, "packing": False}
    write_json(tmp_path / "run.json", {"quantization_config": None, "arguments": then})
    check_same_settings(tmp_path / "checkpoint-3", settings(**then | {"max_length": 2048}))
