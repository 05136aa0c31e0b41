"""Bases whose files somebody has edited."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def edited(model_dirs: dict[str, Path], tmp_path: Path) -> Callable[..., str]:
    """A copy of a tiny Llama in which a JSON file says something else."""

    def edit(file: str, **changes: object) -> str:
        base = shutil.copytree(model_dirs["llama"], tmp_path / "base", dirs_exist_ok=True)
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | changes))
        return str(base)

    return edit
