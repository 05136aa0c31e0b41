"""Real training processes that are killed, stopped or run out of disk, and go on to the very same end."""

import os
import random
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from plainlora.folders import find_damage
from plainlora.run.checkpoints import find_problem, newest_checkpoint
from plainlora.run.folder import UNFINISHED, list_checkpoints
from tests.conftest import ROOT
from tests.recipes.forked import Order, finish, start
from tests.refusals import without_progress


@pytest.fixture(autouse=True, scope="module")
def _server_finds_the_tests() -> None:
    """The fork server imports this package before it has been told where it is."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


@dataclass(frozen=True)
class Runs:
    """The same command again and again, each time in another folder.

    Attributes:
        folder: Where the folders are.
        command: The program and its flags, but for the folder.
        weights: The file that must come out the same.
    """

    folder: Path
    command: tuple[str, ...]
    weights: str

    def order(self, name: str, *flags: str) -> Order:
        output = self.folder / name
        command = (*self.command, "--output_dir", str(output), *flags)
        return Order(command, output, log=self.folder / f"{name}.log", trace=self.folder / f"{name}.trace")

    def go_on(self, name: str) -> None:
        """What a user does after a crash: resumes, or starts anew where nothing has been saved."""
        saved = newest_checkpoint(self.folder / name)
        order = self.order(name, *(("--resume_from_checkpoint", "true") if saved else ("--overwrite",)))
        assert finish(order) == 0, order.log.read_text()

    def bytes_of(self, name: str) -> bytes:
        return (self.folder / name / self.weights).read_bytes()

    def changes(self) -> list[tuple[int, str]]:
        """Those that the uninterrupted run made, numbered from 1."""
        return list(enumerate(self.order("whole").trace.read_text().splitlines(), 1))

    def first_save(self) -> list[int]:
        """The changes within it, as those within the others."""
        first = next(at for at, line in self.changes() if line.startswith("os.rename") and line.endswith("-2"))
        return [at for at, line in self.changes() if f"/{UNFINISHED}/" in line and at <= first]

    def later_saves(self) -> list[int]:
        first = self.first_save()
        return [at for at, line in self.changes() if f"/{UNFINISHED}/" in line and at not in first]

    def outside(self) -> list[int]:
        return [at for at, line in self.changes() if f"/{UNFINISHED}/" not in line]


def uninterrupted(folder: Path, command: tuple[str, ...], weights: str) -> Runs:
    """Runs the command once, from the beginning to the end."""
    runs = Runs(folder, command, weights)
    order = runs.order("whole")
    assert finish(order) == 0, order.log.read_text()
    return runs


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, model_dirs: dict[str, Path], rows_file: Path) -> Runs:
    """A second of training: eight steps, a save after every second of them, two checkpoints kept."""
    return uninterrupted(
        tmp_path_factory.mktemp("sft"),
        (
            *("recipes/sft.py", "--config", "recipes/gpt2-alpaca-gpt4/lora.yaml", "--packing", "false"),
            *("--model_name_or_path", str(model_dirs["gpt2"]), "--dataset_name", str(rows_file)),
            *("--test_split_size", "8", "--max_length", "256", "--per_device_train_batch_size", "2"),
            *("--gradient_accumulation_steps", "1", "--lora_dropout", "0.1", "--learning_rate", "5e-3"),
            *("--max_steps", "8", "--save_steps", "2", "--save_total_limit", "2", "--eval_strategy", "no"),
            *("--logging_steps", "4", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
            *("--max_new_tokens", "1", "--gradient_checkpointing", "false", "--lr_scheduler_type", "constant"),
        ),
        "adapter_model.safetensors",
    )


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory, backbone_dirs: dict[str, Path], texts_file: Path) -> Runs:
    """Likewise for a classifier whose every weight is trained."""
    return uninterrupted(
        tmp_path_factory.mktemp("classify"),
        (
            *("recipes/classify.py", "--config", "recipes/distilbert-imdb/full.yaml"),
            *("--model_name_or_path", str(backbone_dirs["distilbert"]), "--dataset_name", str(texts_file)),
            *("--labels", "ham", "spam", "--text_column", "text", "--validation_split_size", "20"),
            *("--test_split_size", "20", "--per_device_train_batch_size", "8", "--max_steps", "6"),
            *("--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"),
            *("--logging_steps", "3", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
            *("--learning_rate", "5e-3"),
        ),
        "model.safetensors",
    )


@dataclass(frozen=True)
class Struck:
    """What a kill left: a save that was not finished, and whether there was anything to go on from."""

    inside_a_save: bool
    something_saved: bool


def kill_and_go_on(runs: Runs, name: str, at: int, delay: float = 0.0) -> Struck:
    """Kills a run, finds nothing but whole files under their names, and brings it to the very same end."""
    order = replace(runs.order(name), strike_at=at, delay=delay)
    assert finish(order) == -signal.SIGKILL, order.log.read_text()
    for checkpoint in list_checkpoints(order.output):
        assert find_problem(checkpoint) is None
    if (order.output / runs.weights).exists():
        assert runs.bytes_of(name) == runs.bytes_of("whole")
    struck = Struck((order.output / UNFINISHED).exists(), newest_checkpoint(order.output) is not None)
    runs.go_on(name)
    assert runs.bytes_of(name) == runs.bytes_of("whole")
    assert find_damage(order.output) is None
    assert not (order.output / UNFINISHED).exists()
    return struck


def test_u10_u09_training_that_is_killed_at_twenty_random_moments_ends_with_the_same_bytes(sft: Runs) -> None:
    first_save, later_saves, others = sft.first_save(), sft.later_saves(), sft.outside()
    draw = random.Random(6)
    moments = [(at, 0.0) for at in (*draw.sample(first_save, 3), *draw.sample(later_saves, 7))]
    moments += [(at, 0.0) for at in (others[0], others[-1], *draw.sample(others[1:-1], 2))]
    moments += [(at, draw.uniform(0.001, 0.2)) for at in draw.sample(later_saves[: len(later_saves) // 2], 6)]
    assert len(set(moments)) == 20
    struck = [kill_and_go_on(sft, f"killed-{number}", *moment) for number, moment in enumerate(moments)]
    assert sum(each.inside_a_save for each in struck) >= 10
    assert sum(each.inside_a_save and each.something_saved for each in struck) >= 7
    assert sum(not each.something_saved for each in struck) >= 4
    assert sum(each.something_saved and not each.inside_a_save for each in struck) >= 2


def test_u10_a_classifier_that_is_killed_ends_with_the_same_bytes(classify: Runs) -> None:
    draw, later_saves = random.Random(6), classify.later_saves()
    moments = (draw.choice(classify.first_save()), draw.choice(later_saves), later_saves[-1])
    struck = [kill_and_go_on(classify, f"killed-{at}", at) for at in moments]
    assert all(each.inside_a_save for each in struck)
    assert [each.something_saved for each in struck] == [False, True, True]


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def last_words(runs: Runs, name: str, at: int, number: signal.Signals, code: int, saved: str) -> str:
    """What a run says at the end that is sent a signal before a change; then it goes on to the very same end."""
    order = replace(runs.order(name), strike_at=at, signal=number)
    assert finish(order) == code, order.log.read_text()
    said = order.log.read_text()
    assert "Traceback" not in said
    assert newest_checkpoint(order.output) == order.output / saved
    runs.go_on(name)
    assert runs.bytes_of(name) == runs.bytes_of("whole")
    return without_progress(said)[-1]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_u10_a_signal_ends_training_with_a_checkpoint_and_says_how_to_go_on(
    sft: Runs, number: signal.Signals, code: int
) -> None:
    # It comes while step 2 is saved, so that step 3 is the one that is ended.
    assert last_words(sft, number.name, sft.first_save()[3], number, code, "checkpoint-3") == (
        f"stopped after step 3 of 8; {sft.folder}/{number.name}/checkpoint-3 is saved; resume with the same command "
        "and --resume_from_checkpoint true"
    )


def test_u10_a_signal_after_the_last_step_ends_the_program_too(sft: Runs) -> None:
    last_save = next(at for at, line in sft.changes() if line.endswith(f"{UNFINISHED}/checkpoint-8"))
    said = last_words(sft, "late", last_save, signal.SIGTERM, 143, "checkpoint-8")
    assert said.startswith("SIGTERM: stopped; give the same command again, with --resume_from_checkpoint true")


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_u10_a_signal_before_training_ends_the_program_and_leaves_nothing_half_written(
    sft: Runs, number: signal.Signals, code: int
) -> None:
    order = sft.order(f"loading-{number.name}")
    process = start(order)
    while not (order.log.exists() and "train rows" in order.log.read_text()):
        process.join(0.01)
        assert process.exitcode is None
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    said = order.log.read_text()
    assert process.exitcode == code, said
    assert "Traceback" not in said
    sft.go_on(order.output.name)
    assert sft.bytes_of(order.output.name) == sft.bytes_of("whole")


def test_u10_a_disk_that_is_full_in_the_middle_of_a_save_loses_nothing(sft: Runs) -> None:
    """The kernel refuses to write files beyond a size, as it refuses to write any on a full disk."""
    whole = sft.order("whole")
    sizes = {path.name: path.stat().st_size for path in (whole.output / "checkpoint-6").iterdir()}
    for refused, flags in (
        ("adapter_model.safetensors", ()),
        ("optimizer.pt", ()),
        ("adapter_model.safetensors", ("--save_strategy", "no")),
    ):
        name = f"{refused}{len(flags)}"
        order = sft.order(name, "--resume_from_checkpoint", "true", *flags)
        shutil.copytree(whole.output / "checkpoint-6", order.output / "checkpoint-6")
        assert finish(replace(order, largest_file=sizes[refused] - 1)) == 2, order.log.read_text()
        said = without_progress(order.log.read_text())[-1]
        what = f"the final save in {order.output}" if flags else f"{order.output}/checkpoint-8"
        assert said.startswith(f"error: {what} could not be written ("), said
        assert said.endswith(
            "what was saved before is untouched; make room, and resume with --resume_from_checkpoint true"
        )
        assert [path.name for path in list_checkpoints(order.output)] == ["checkpoint-6"]
        assert find_problem(order.output / "checkpoint-6") is None
        assert not (order.output / UNFINISHED).exists()
        assert not (order.output / sft.weights).exists()
        sft.go_on(name)
        assert sft.bytes_of(name) == sft.bytes_of("whole")
