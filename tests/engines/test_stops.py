"""Two processes that are stopped, killed, or run out of disk: each engine goes on to the bytes of a run left alone."""

import json
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from os import killpg
from pathlib import Path
from typing import Any

import pytest

from plainlora.folders import MANIFEST, find_damage
from plainlora.run.checkpoints import find_problem
from plainlora.run.folder import UNFINISHED, list_checkpoints
from tests.engines import kills, matrix
from tests.engines.kills import CONFIGS, Moment, launched, log_of
from tests.engines.matrix import Launch, carry_out

STEPS = 40
FLAGS = (
    *("--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "20", "--save_total_limit", "9"),
    *("--lora_dropout", "0.1", "--exact_match_rows", "1", "--max_new_tokens", "1"),
)
SAME = ("adapter_model.safetensors", *(f"checkpoint-{STEPS}/{name}.pt" for name in ("optimizer", "scheduler")))
RESUME = ("--resume_from_checkpoint", "true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stops")


def launch_of(config: str, name: str, *flags: str) -> Launch:
    return Launch(name, config, 2, 400, (*FLAGS, *flags))


def whole(config: str, folder: Path) -> Path:
    """The folder of a run that is left alone; carried out once."""
    assert carry_out(launch_of(config, f"{config}, whole"), folder) == ""
    return folder / f"{config}, whole"


def same(found: Path, expected: Path) -> bool:
    return all((found / name).read_bytes() == (expected / name).read_bytes() for name in SAME)


def run_until_it_ends(launch: Launch, folder: Path, when: str, send: Callable[[Any], None], **options: Any) -> str:
    """What a launch says that is sent something when it has said `when`; every process of it has ended."""
    log = log_of(launch, folder)
    with launched(launch, folder, **options) as launcher:
        while when not in log.read_text():
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.01)
        processes = list(kills.processes_of(launcher).values())
        send(launcher)
        assert kills.wait_until_gone(launcher, processes) < kills.LIMIT
        assert launcher.returncode == 1  # the launcher's own, for whatever its processes end with
    return log.read_text()


SENDERS = {
    "SIGTERM": lambda launcher: launcher.terminate(),
    "SIGINT": lambda launcher: killpg(launcher.pid, signal.SIGINT),  # Ctrl-C reaches all that run in a terminal
}


@pytest.mark.integration
@pytest.mark.parametrize("config", CONFIGS)
def test_u10_two_processes_that_are_stopped_twice_go_on_to_the_same_bytes(config: str, folder: Path) -> None:
    output, steps = folder / f"{config}, stopped", [0]
    for name, send in SENDERS.items():
        launch = launch_of(config, output.name, *(RESUME if steps[1:] else ()))
        said = run_until_it_ends(launch, folder, "'loss'", send)
        found = re.findall(
            rf"^stopped after step (\d+) of {STEPS}; (\S.*) is saved; resume with the same command and "
            "--resume_from_checkpoint true$",
            said,
            flags=re.MULTILINE,
        )
        assert len(found) == 1, said
        assert f"{name}: ending this step, then saving" in said
        steps.append(int(found[0][0]))
        saved = list_checkpoints(output)[-1]
        assert found[0][1] == str(saved)
        assert find_problem(saved) is None
        assert not (output / UNFINISHED).exists()
    assert 0 < steps[1] < steps[2] < STEPS
    assert carry_out(launch_of(config, output.name, *RESUME), folder) == ""
    assert same(output, whole(config, folder))
    assert (output / MANIFEST).is_file()
    assert find_damage(output) is None


@pytest.mark.integration
@pytest.mark.parametrize("config", ["ddp", "deepspeed_zero3"])
def test_u10_a_disk_that_is_full_for_the_process_that_writes_ends_both_and_loses_nothing(
    config: str, folder: Path
) -> None:
    """The kernel refuses to write files beyond a size, as it refuses to write any on a full disk."""
    done, output = whole(config, folder), folder / f"{config}, full"
    shutil.copytree(done / "checkpoint-20", output / "checkpoint-20")
    most = (done / "checkpoint-20" / "optimizer.pt").stat().st_size - 1
    launch = launch_of(config, output.name, *RESUME)
    said = run_until_it_ends(
        launch, folder, "'loss'", lambda _: None,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY)),
    )  # fmt: skip
    writes, waits = sorted(re.findall(r"^(?:error|SIGTERM): (.*; .*)$", said, flags=re.MULTILINE))
    assert writes.startswith(f"{output}/checkpoint-40 could not be written ("), said
    assert writes.endswith(
        "what was saved before is untouched; make room, and resume with --resume_from_checkpoint true"
    )
    assert " gone" in waits
    assert f"{output}/checkpoint-20 is kept; resume with the same command and --resume_from_checkpoint true" in waits
    codes = dict(re.findall(r"^\s+rank\s*: (\d+).*\n\s+exitcode\s*: (-?\d+)", said, flags=re.MULTILINE))
    assert codes["0"] == "2"  # the other one may be ended by the launcher
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-20"]
    assert find_problem(output / "checkpoint-20") is None
    assert not (output / UNFINISHED).exists()
    assert not (output / "adapter_model.safetensors").exists()
    assert carry_out(launch, folder) == ""
    assert same(output, done)


@pytest.mark.slow
def test_u10_processes_that_are_killed_end_their_job_and_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    engines, found = ("ddp", "deepspeed_zero3", "fsdp2"), []
    whole = {engine: kills.measure(engine, tmp_path)[0] for engine in engines}
    moments = [*(Moment(saves, 0.0) for saves in (2, 5, 9, 14)), Moment(0, 0.5), Moment(0, whole["fsdp2"] / 2)]
    for number, moment in enumerate(moments):
        engine = engines[number % 3]
        found.append(kills.kill(engine, (number // 3 + number) % 2, moment, f"{engine}, {number}", tmp_path))
    ended = [each for each in found if each is not None]
    assert len(ended) == 6
    assert [each for each in ended if not each.holds] == []
    assert {each.rank for each in ended} == {0, 1}
    assert sum(each.inside_a_save for each in ended) >= 2
    assert sum(bool(each.said) for each in ended) >= 4  # not of one that had done all its work


def test_the_table_of_the_docs_is_that_of_the_kills() -> None:
    content = json.loads((matrix.DOCS / "kills.json").read_text())["kills"]
    assert all(each.pop("holds") for each in content)
    found = [kills.Kill(**each) for each in content]
    assert all(each.holds for each in found)
    assert {each.engine for each in found} == {*CONFIGS}
    assert kills.table(found) in (matrix.DOCS / "kills.md").read_text()
