"""Classes are compared in their order, however many there are. Whole runs: tests/recipes/test_resumption.py."""

from pathlib import Path

import pytest

from plainlora.errors import UserError
from plainlora.report import write_json
from plainlora.run.resumption import check_same_settings


def test_classes_are_the_same_in_their_order_only(tmp_path: Path) -> None:
    labels = [f"class number {number}" for number in range(100)]  # as one text, longer than a file may be called
    write_json(tmp_path / "run.json", {"quantization_config": None, "labels": labels})
    check_same_settings(tmp_path / "checkpoint-3", [], labels)
    with pytest.raises(UserError, match=r"was trained with labels .*; give the same settings"):
        check_same_settings(tmp_path / "checkpoint-3", [], labels[::-1])
