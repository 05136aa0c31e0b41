"""Which checkpoint a run goes on from, and what a new run may replace."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from plainlora import inject, save_adapter
from plainlora.checkpoints import claim_output_dir, clear_output_dir, is_whole, list_checkpoints, newest_checkpoint
from plainlora.errors import UserError
from tests.conftest import make_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Trainer writes at a step: adapter, optimizer, schedule, state."""
    folder = tmp_path_factory.mktemp("whole")
    model = inject(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, folder)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict(), folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    return folder


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Path:
    for step in (9, 10, 100):
        shutil.copytree(checkpoint, tmp_path / f"checkpoint-{step}")
    return tmp_path


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return damage


def take_away(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def blank(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"")


FILES = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]


def test_checkpoints_are_listed_by_number_not_by_name(run: Path) -> None:
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    (run / "checkpoint-final").mkdir()
    (run / "checkpoint-200").write_text("a file")
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert newest_checkpoint(run) == run / "checkpoint-100"


@pytest.mark.parametrize("damage", [cut, take_away, blank])
@pytest.mark.parametrize("name", FILES)
def test_u10_a_damaged_newer_checkpoint_is_passed_over(
    run: Path, name: str, damage: Callable[[str], Callable[[Path], object]]
) -> None:
    assert is_whole(run / "checkpoint-100")
    damage(name)(run / "checkpoint-100")
    assert newest_checkpoint(run) == run / "checkpoint-10"


def test_u10_an_emptied_checkpoint_is_passed_over(run: Path) -> None:
    empty(run / "checkpoint-100")
    empty(run / "checkpoint-10")
    assert newest_checkpoint(run) == run / "checkpoint-9"
    empty(run / "checkpoint-9")
    assert newest_checkpoint(run) is None
    assert newest_checkpoint(run / "nowhere") is None


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "all_results.json", "run.json"]
)
def test_another_runs_results_are_not_mixed_with(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"holds another run .{name}.; .*--output_dir.*--resume.* true.*--overwrite"):
        claim_output_dir(tmp_path, overwrite=False, resume=False)
    claim_output_dir(tmp_path, overwrite=True, resume=False)
    claim_output_dir(tmp_path, overwrite=False, resume=True)


def test_another_runs_checkpoints_are_not_mixed_with(run: Path) -> None:
    with pytest.raises(UserError, match="checkpoint-10, checkpoint-100, checkpoint-9"):
        claim_output_dir(run, overwrite=False, resume=False)


def test_a_new_an_empty_and_a_strangers_folder_are_free(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path / "new", tmp_path):
        claim_output_dir(folder, overwrite=False, resume=False)
    assert not (tmp_path / "new").exists()


def test_clearing_removes_the_runs_own_files_only(run: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, run, dirs_exist_ok=True)
    for name in ("README.md", "loss.png", "run.json", "all_results.json"):
        (run / name).write_text("{}")
    (run / "merged").mkdir()
    for name in ("merge.json", "model.safetensors"):
        (run / "merged" / name).write_text("{}")
    strangers = ["notes.txt", "checkpoint-final/weights", "data/rows.jsonl", "optimizer.pt", "scheduler.pt"]
    for name in strangers:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    clear_output_dir(run)
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert left == sorted(strangers)
    clear_output_dir(run / "nowhere")
