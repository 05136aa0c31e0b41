"""What is wrong with a base's files is said by name, and what lies in the Hub's cache is found there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from plainlora.base.files import INDEX, POINTER, WHOLE, find_fault, is_on_disk


def cut(folder: Path) -> None:
    (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:-9])


def name_a_shard(folder: Path) -> None:
    (folder / WHOLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "what", "said"),
    [
        (lambda folder: (folder / WHOLE).write_bytes(POINTER + b"v1\n"), "model", "is a Git LFS pointer"),
        (lambda folder: (folder / WHOLE).write_bytes(b""), "model", f"{WHOLE} is empty; copy it again"),
        (cut, "model", f"{WHOLE} is cut short or damaged"),
        (name_a_shard, "model", "model-00001-of-00002.safetensors is missing, which"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer", "holds no tokenizer"),
    ],
)
def test_a_file_that_is_not_whole_is_named(
    damage: Callable[[Path], object], what: str, said: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    assert find_fault(folder, what) is None  # type: ignore[arg-type]
    damage(folder)
    assert said in str(find_fault(folder, what))  # type: ignore[arg-type]


def test_a_base_is_on_this_disk_if_it_is_a_folder_or_whole_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert is_on_disk(str(tmp_path), None)
    for name, files in (("whole", [WHOLE]), ("sharded", [INDEX, "a.safetensors"]), ("half", [INDEX])):
        assert not is_on_disk(f"ann/{name}", None)
        snapshot = tmp_path / f"models--ann--{name}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        for file in files:
            (snapshot / file).write_text(json.dumps({"weight_map": {"weight": "a.safetensors"}}))
        assert is_on_disk(f"ann/{name}", None) == (name != "half")
        assert not is_on_disk(f"ann/{name}", "another")
