"""Which checkpoint a run goes on from, and what a new run may replace."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerState, TrainingArguments

from plainlora import inject, save_adapter
from plainlora.errors import UserError
from plainlora.folders import write_manifest
from plainlora.training.checkpoints import (
    UNFINISHED,
    check_inputs_apart,
    claim_output_dir,
    clear_output_dir,
    find_problem,
    list_checkpoints,
    newest_checkpoint,
    remove_checkpoint,
)
from plainlora.training.trainers import resume_path
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
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    return folder


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Path:
    for step in (9, 10, 100):
        shutil.copytree(checkpoint, tmp_path / f"checkpoint-{step}")
        write_state(tmp_path / f"checkpoint-{step}", {"global_step": step})
    return tmp_path


def write_state(checkpoint: Path, changes: dict[str, object]) -> None:
    state = asdict(TrainerState(train_batch_size=2, log_history=[{"loss": 1.5, "step": 1}]))
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | changes))


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


FILES = ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]
FILES += ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


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
    assert not find_problem(run / "checkpoint-100")
    damage(name)(run / "checkpoint-100")
    assert newest_checkpoint(run) == run / "checkpoint-10"


def flip_a_bit(name: str) -> Callable[[Path], None]:
    """In the middle of the file, where neither a zip's directory nor a header stands."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


@pytest.mark.parametrize("damage", [cut, take_away, blank, flip_a_bit])
@pytest.mark.parametrize("name", [*FILES, "rng_state.pth", "tokenizer.json", "manifest.json"])
def test_u10_with_a_manifest_any_damage_to_any_file_is_passed_over_and_named(
    run: Path, name: str, damage: Callable[[str], Callable[[Path], object]]
) -> None:
    for checkpoint in list_checkpoints(run):
        torch.save({"python": (3, (1, 2), None), "cpu": torch.get_rng_state()}, checkpoint / "rng_state.pth")
        (checkpoint / "tokenizer.json").write_bytes(bytes(range(100)))
        write_manifest(checkpoint)
    said: list[str] = []
    assert newest_checkpoint(run, said.append) == run / "checkpoint-100"
    assert said == []
    damage(name)(run / "checkpoint-100")
    if (name, damage) == ("manifest.json", take_away):  # as a checkpoint of elsewhere has none
        assert newest_checkpoint(run, said.append) == run / "checkpoint-100"
        return
    assert newest_checkpoint(run, said.append) == run / "checkpoint-10"
    assert len(said) == 1
    assert said[0].startswith(f"{run / 'checkpoint-100'} is passed over: ")
    if damage in (take_away, flip_a_bit) and name not in (
        "manifest.json",
        "adapter_config.json",
        "trainer_state.json",
    ):
        assert name in said[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evil": 1}, "holds 'evil', which Trainer has no place for"),
        ({"global_step": "x"}, "says that global_step is 'x'"),
        ({"global_step": 10**12}, "says that global_step is 1000000000000"),
        ({"global_step": -5}, "says that global_step is -5"),
        ({"global_step": 100.0}, "says that global_step is 100.0"),
        ({"train_batch_size": None}, "says that train_batch_size is None"),
        ({"is_world_process_zero": 1}, "says that is_world_process_zero is 1"),
        ({"best_model_checkpoint": 5}, "says that best_model_checkpoint is 5"),
        ({"stateful_callbacks": [5]}, "says that stateful_callbacks is [5]"),
        ({"log_history": [5]}, "holds 5 in log_history"),
        ({"log_history": [{"loss": "x"}]}, "holds {'loss': 'x'} in log_history"),
    ],
)
def test_u10_a_state_that_trainer_cannot_have_written_is_passed_over(
    run: Path, changes: dict[str, object], said: str
) -> None:
    write_state(run / "checkpoint-100", {"global_step": 100} | changes)
    assert find_problem(run / "checkpoint-100") == f"trainer_state.json {said}"
    assert newest_checkpoint(run) == run / "checkpoint-10"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "scaler.pt"])
def test_u23_a_pickle_that_runs_code_is_found_before_anything_is_loaded(run: Path, name: str) -> None:
    torch.save({"state": print}, run / "checkpoint-100" / name)
    said = find_problem(run / "checkpoint-100")
    assert said == f"{name} is cut short, or holds more than numbers and text, which could run code"


def test_u10_each_that_is_passed_over_is_named_and_a_path_that_is_not_whole_is_refused(run: Path) -> None:
    def arguments(asked: str) -> TrainingArguments:
        return TrainingArguments(output_dir=str(run), resume_from_checkpoint=asked, use_cpu=True)

    take_away("optimizer.pt")(run / "checkpoint-100")
    blank("adapter_model.safetensors")(run / "checkpoint-10")
    said: list[str] = []
    assert resume_path(arguments("true"), said.append) == str(run / "checkpoint-9")
    assert said[0] == f"{run / 'checkpoint-100'} is passed over: optimizer.pt is missing"
    assert said[1].startswith(f"{run / 'checkpoint-10'} is passed over: a file is damaged: ")
    assert resume_path(arguments("false")) is None
    assert resume_path(arguments(str(run / "checkpoint-9"))) == str(run / "checkpoint-9")
    with pytest.raises(UserError, match=r"checkpoint-100 is not whole: optimizer.pt is missing; .* or `true`"):
        resume_path(arguments(str(run / "checkpoint-100")))
    with pytest.raises(UserError, match="nowhere is no checkpoint folder"):
        resume_path(arguments(str(run / "nowhere")))
    empty(run / "checkpoint-9")
    with pytest.raises(UserError, match="holds no whole checkpoint; leave it out to start"):
        resume_path(arguments("true"))


def test_removing_a_checkpoint_removes_what_a_kill_left_of_another(run: Path) -> None:
    left = run / UNFINISHED
    (left / "checkpoint-9").mkdir(parents=True)
    (left / "checkpoint-9" / "optimizer.pt").write_bytes(b"half")
    remove_checkpoint(run / "checkpoint-9")
    assert not left.exists()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-10", "checkpoint-100"]


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
