"""Which checkpoint a run goes on from, and what a new run may replace."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from plainlora import inject, save_adapter
from plainlora.checkpoints import (
    check_inputs_apart,
    claim_output_dir,
    clear_output_dir,
    is_whole,
    list_checkpoints,
    newest_checkpoint,
)
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


@pytest.mark.parametrize("name", ["trainer_state.json", "run.json"])
def test_another_runs_results_are_not_mixed_with(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"holds another run .{name}.; .*--output_dir.*--resume.* true.*--overwrite"):
        claim_output_dir(tmp_path, overwrite=False, resume=None)
    claim_output_dir(tmp_path, overwrite=True, resume=None)
    claim_output_dir(tmp_path, overwrite=False, resume=tmp_path / "checkpoint-3")


def test_another_runs_checkpoints_are_not_mixed_with(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for resume in (None, tmp_path_factory.mktemp("elsewhere") / "checkpoint-9"):
        with pytest.raises(UserError, match="checkpoint-10, checkpoint-100, checkpoint-9"):
            claim_output_dir(run, overwrite=False, resume=resume)
    claim_output_dir(run, overwrite=True, resume=None)  # what an interrupted run leaves


@pytest.mark.parametrize(
    "name", ["README.md", "loss.png", "merged/model", "adapter_model.safetensors", "adapter_config.json"]
)
def test_what_no_run_wrote_is_not_replaced_even_if_asked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"is not a run's folder, but holds {Path(name).parts[0]}; give another"):
            claim_output_dir(tmp_path, overwrite, resume=None)
    clear_output_dir(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_merged_folder_in_a_run_that_no_merge_wrote_is_not_replaced(run: Path) -> None:
    (run / "merged").mkdir()
    claim_output_dir(run, overwrite=True, resume=None)
    (run / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="merged was not written by a run"):
        claim_output_dir(run, overwrite=True, resume=None)


def test_a_new_an_empty_and_a_strangers_folder_are_free(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path / "new", tmp_path):
        claim_output_dir(folder, overwrite=False, resume=None)
    assert not (tmp_path / "new").exists()


def test_the_output_may_not_hold_what_the_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    for output in (tmp_path, tmp_path / "data"):
        for name in (tmp_path / "data", tmp_path / "data" / "rows.jsonl"):
            with pytest.raises(UserError, match=f"is or holds the dataset {name}; give a folder of its own"):
                check_inputs_apart(output, {"dataset": str(name)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"output_dir . is or holds the dataset data/rows.jsonl"):
        check_inputs_apart(".", {"dataset": "data/rows.jsonl"})
    check_inputs_apart(tmp_path, {"dataset": "tatsu-lab/alpaca", "test dataset": None})
    check_inputs_apart(tmp_path / "data" / "out", {"dataset": "data"})


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
