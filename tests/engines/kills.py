"""Runs in two processes of which one is killed: how soon the job ends, and whether it goes on to the same bytes.

    python -m tests.engines.kills

Each run is a real `accelerate launch` of `recipes/sft.py` that saves after every step. One of its two processes,
either one, gets SIGKILL at a random moment, in every second run within a save. The launcher and the other process must
be gone within a minute. Then the run is resumed, or begun anew if nothing was saved, and must end in the files of a
run that nobody killed, byte for byte. It prints a line a run and writes `docs/engines/kills.json` and
`docs/engines/kills.md`.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import describe_machine
from plainlora.run.checkpoints import find_problem, newest_checkpoint
from plainlora.run.folder import UNFINISHED, list_checkpoints
from tests.engines.matrix import DOCS, ENGINES, ROOT, Launch, carry_out, command_of, environment, write_rows

CONFIGS = {engine.config: engine.name for engine in ENGINES if not engine.base}
STEPS = 20
FLAGS = (
    *("--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"),
    *("--lora_dropout", "0.1", "--exact_match_rows", "1", "--max_new_tokens", "1"),
)
SAME = ("adapter_model.safetensors", *(f"checkpoint-{STEPS}/{name}.pt" for name in ("optimizer", "scheduler")))
LIMIT = 60.0  # seconds in which the job must end
OUR_LINE = r"^(?:error|SIGTERM): (.*is gone.*)$"  # what a process says when another one is gone


@dataclass(frozen=True)
class Kill:
    """What came of one.

    Attributes:
        engine: A config of `accelerate_configs`.
        rank: Of the process that was killed.
        inside_a_save: Whether a save was being written.
        kept: The checkpoint that was left to go on from, if any.
        damaged: Checkpoints that were not whole.
        seconds: From the kill until the launcher and the other process were gone.
        said: The last line that a process of ours printed.
        different: Files that differ from those of the run that nobody killed.
    """

    engine: str
    rank: int
    inside_a_save: bool
    kept: str | None
    damaged: list[str]
    seconds: float
    said: str
    different: list[str]

    @property
    def holds(self) -> bool:
        """Whether the job ended in time, with whole checkpoints, and went on to the same bytes."""
        return self.seconds <= LIMIT and not self.damaged and not self.different


def launch_of(engine: str, name: str) -> Launch:
    """A run on an engine."""
    return Launch(name, engine, 2, 400, FLAGS)


def log_of(launch: Launch, folder: Path) -> Path:
    """What a launch prints that may be killed; that of the resumed run is beside it."""
    return folder / f"{launch.name}, launched.log"


@contextmanager
def launched(launch: Launch, folder: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A running launch, whose output goes to a log; what is left of it at the end is killed.

    Args:
        launch: The launch.
        folder: Of its folder and log.
        **options: Of `subprocess.Popen`.
    """
    write_rows(folder, launch.rows)
    with log_of(launch, folder).open("w") as log:
        process = subprocess.Popen(
            command_of(launch, folder), cwd=ROOT, env=environment() | {"PYTHONUNBUFFERED": "1"}, stdout=log,
            stderr=log, start_new_session=True, **options,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def processes_of(launcher: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The launcher's training processes, by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children():
        with suppress(psutil.Error):
            if (rank := process.environ().get("RANK")) is not None:
                found[int(rank)] = process
    return found


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended; nobody may have asked for its exit code yet."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def wait_until_gone(launcher: subprocess.Popen[bytes], processes: Sequence[psutil.Process]) -> float:
    """Seconds until all of them are; those of `LIMIT` and more if they are not."""
    since = time.monotonic()
    while (took := time.monotonic() - since) <= LIMIT:
        if launcher.poll() is not None and all(map(is_gone, processes)):
            break
        time.sleep(0.02)
    return took


@dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Attributes:
        saves: After how many saves have begun; 0 to count from the first line that the program prints.
        delay: Seconds after that.
    """

    saves: int
    delay: float

    def wait(self, launcher: subprocess.Popen[bytes], launch: Launch, folder: Path) -> bool:
        """Waits for it; returns whether the run is still going on."""
        scratch, log = folder / launch.name / UNFINISHED, log_of(launch, folder)
        begun, before = 0, False
        while launcher.poll() is None and (begun < self.saves if self.saves else "train rows" not in log.read_text()):
            now = scratch.exists()
            begun, before = begun + (now and not before), now
            time.sleep(0.001 if self.saves else 0.02)
        time.sleep(self.delay)
        return launcher.poll() is None


def moments(draw: random.Random, whole: float, save: float) -> Iterator[Moment]:
    """Moments within saves and anywhere, by turns.

    Args:
        draw: Draws them.
        whole: Seconds from the first line that is printed to the end of a run.
        save: Seconds of a save.
    """
    while True:
        yield Moment(draw.randint(1, STEPS), draw.uniform(0, save / 2))  # until it is seen, some of it is over
        yield Moment(0, draw.uniform(0, whole))


def measure(engine: str, folder: Path) -> tuple[float, float]:
    """Carries out the run that nobody kills.

    Returns:
        Seconds from the first line that it prints to its end, and those of a save, the median.
    """
    launch = launch_of(engine, f"{engine}, whole")
    carry_out(replace(launch, name=f"{engine}, first"), folder)  # in which DeepSpeed may have to compile
    with launched(launch, folder) as launcher:
        Moment(0, 0).wait(launcher, launch, folder)
        since, saves, begun = time.monotonic(), [], 0.0
        while launcher.poll() is None:
            if (folder / launch.name / UNFINISHED).exists() != bool(begun):
                saves += [time.monotonic() - begun] if begun else []
                begun = 0.0 if begun else time.monotonic()
            time.sleep(0.001)
        whole = time.monotonic() - since
        if launcher.returncode:
            raise RuntimeError(log_of(launch, folder).read_text())
    return whole, statistics.median(saves)


def kill(engine: str, rank: int, moment: Moment, name: str, folder: Path) -> Kill | None:
    """Kills a process of a run, and resumes the run.

    Returns:
        What came of it; `None` if the run had ended before.
    """
    launch = launch_of(engine, name)
    output = folder / name
    with launched(launch, folder) as launcher:
        if not moment.wait(launcher, launch, folder):
            return None
        processes = processes_of(launcher)
        if rank not in processes or is_gone(processes[rank]):
            return None
        processes[rank].kill()
        inside = (output / UNFINISHED).exists()
        seconds = wait_until_gone(launcher, list(processes.values()))
    lines = re.findall(OUR_LINE, log_of(launch, folder).read_text(errors="replace"), flags=re.MULTILINE)
    damaged = [path.name for path in list_checkpoints(output) if find_problem(path)]
    kept = newest_checkpoint(output)
    flags = ("--resume_from_checkpoint", "true") if kept else ("--overwrite",)
    problem = carry_out(replace(launch, flags=(*FLAGS, *flags)), folder)
    different = [problem] if problem else differing(output, folder / f"{engine}, whole")
    said = lines[-1].replace(str(output), "OUTPUT_DIR") if lines else ""
    return Kill(engine, rank, inside, kept.name if kept else None, damaged, round(seconds, 2), said, different)


def differing(found: Path, expected: Path) -> list[str]:
    """The files of `SAME` that are not the same, byte for byte."""
    return [name for name in SAME if (found / name).read_bytes() != (expected / name).read_bytes()]


def run(count: int, engines: Sequence[str], seed: int, folder: Path) -> Iterator[Kill]:
    """Kills and resumes `count` runs, of the engines by turns, each a line on the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, upcoming = random.Random(seed), {}
    for engine in engines:
        upcoming[engine] = moments(draw, *measure(engine, folder))
    number = tried = 0
    while number < count:
        engine, tried = engines[number % len(engines)], tried + 1
        found = kill(engine, draw.randrange(2), next(upcoming[engine]), f"{engine}, {tried}", folder)
        if found is not None:
            number += 1
            print(f"{number} of {count}: {json.dumps(asdict(found))}", flush=True)
            yield found


def table(kills: Sequence[Kill]) -> str:
    """The kills in Markdown: a row for each engine."""
    head = (
        *("engine", "kills", "of rank 0", "inside a save", "nothing saved yet"),
        *("seconds until the job ended: median, largest", "a line of ours", "the same bytes in the end"),
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for config, name in CONFIGS.items():
        if of_it := [each for each in kills if each.engine == config]:
            seconds = [each.seconds for each in of_it]
            counts = [
                sum(map(bool, each))
                for each in (
                    [each.rank == 0 for each in of_it],
                    [each.inside_a_save for each in of_it],
                    [each.kept is None for each in of_it],
                )
            ]
            row = (
                *(name, len(of_it), *counts, f"{statistics.median(seconds):.1f}, {max(seconds):.1f}"),
                *(sum(bool(each.said) for each in of_it), sum(each.holds for each in of_it)),
            )
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def page(kills: Sequence[Kill]) -> str:
    """The page of the docs."""
    return (
        f"# Killed processes\n\nRuns in two processes of {STEPS} steps with a save after each, of which one process "
        f"was killed (SIGKILL) at a random moment: `python -m tests.engines.kills`. {len(kills)} kills, "
        f"{sum(each.inside_a_save for each in kills)} of them inside a save; "
        f"{sum(each.holds for each in kills)} jobs ended within {LIMIT:.0f} s, left whole checkpoints, and went on "
        f"to the bytes of a run that nobody killed: {', '.join(f'`{name}`' for name in SAME)}.\n\n"
        f"{table(kills)}\n{describe_machine().removesuffix('.')}, deepspeed {version('deepspeed')}; no GPU.\n"
    )


def write(kills: Sequence[Kill], docs: Path) -> None:
    """Writes both files."""
    docs.mkdir(parents=True, exist_ok=True)
    content = {"kills": [{**asdict(each), "holds": each.holds} for each in kills]}
    (docs / "kills.json").write_text(json.dumps(content, indent=2) + "\n")
    (docs / "kills.md").write_text(page(kills))


def main() -> None:
    """Kills, resumes, and writes down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="of all engines together")
    parser.add_argument("--engines", nargs="*", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are left; an empty one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        kills = []
        for each in run(asked.runs, asked.engines, asked.seed, asked.folder or Path(temporary)):
            kills.append(each)
            write(kills, DOCS)
    print(table(kills))
    raise SystemExit(any(not each.holds for each in kills))


if __name__ == "__main__":
    main()
