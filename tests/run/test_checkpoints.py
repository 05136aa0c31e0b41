"""Which checkpoint a run goes on from, and what a new run may replace."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from plainlora.errors import UserError
from plainlora.folders import write_manifest
from plainlora.run.checkpoints import find_problem, newest_checkpoint, resume_path
from plainlora.run.folder import (
    list_checkpoints,
)
from tests.run.conftest import write_state


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
@pytest.mark.parametrize("name", [*FILES, "tokenizer.json", "manifest.json"])
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
    with pytest.raises(UserError, match="nowhere is not a checkpoint folder"):
        resume_path(arguments(str(run / "nowhere")))
    empty(run / "checkpoint-9")
    with pytest.raises(UserError, match="holds no whole checkpoint; leave it out to start"):
        resume_path(arguments("true"))


def test_u10_an_emptied_checkpoint_is_passed_over(run: Path) -> None:
    empty(run / "checkpoint-100")
    empty(run / "checkpoint-10")
    assert newest_checkpoint(run) == run / "checkpoint-9"
    empty(run / "checkpoint-9")
    assert newest_checkpoint(run) is None
    assert newest_checkpoint(run / "nowhere") is None
