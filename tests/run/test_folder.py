"""A run's folder is taken, cleared and replaced without touching what is somebody else's."""

import shutil
from pathlib import Path

import pytest

from plainlora.errors import UserError
from plainlora.run.folder import (
    UNFINISHED,
    check_inputs_apart,
    claim_output_dir,
    clear_output_dir,
    list_checkpoints,
    remove_checkpoint,
)


def test_removing_a_checkpoint_removes_what_a_kill_left_of_another(run: Path) -> None:
    left = run / UNFINISHED
    (left / "checkpoint-9").mkdir(parents=True)
    (left / "checkpoint-9" / "optimizer.pt").write_bytes(b"half")
    remove_checkpoint(run / "checkpoint-9")
    assert not left.exists()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-10", "checkpoint-100"]


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
    for name in ("README.md", "samples.md", "loss.png", "run.json", "all_results.json"):
        (run / name).write_text("{}")
    (run / "merged").mkdir()
    for name in ("certificate.json", "model.safetensors"):
        (run / "merged" / name).write_text("{}")
    strangers = ["notes.txt", "checkpoint-final/weights", "data/rows.jsonl"]
    strangers += ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    for name in strangers:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    clear_output_dir(run)
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert left == sorted(strangers)
    clear_output_dir(run / "nowhere")
