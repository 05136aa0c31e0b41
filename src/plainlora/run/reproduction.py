"""Repeats a run from its `run.json`, and compares the two byte for byte."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from plainlora.errors import EXIT_CODE, UserError
from plainlora.report import package_versions
from plainlora.run.adapter_base import read_run
from plainlora.run.record import describe_weights
from plainlora.settings.programs import CLASSIFY, SFT, Program

MOST = 1024  # processes or threads
PROGRAMS: dict[str, Program[Any]] = {program.name: program for program in (SFT, CLASSIFY)}
# Flags that are not repeated: the output folder, what follows training, and permission to run code.
DROPPED = (
    "config",
    "output_dir",
    "resume_from_checkpoint",
    "push_to_hub",
    "merge",
    "overwrite",
    "report_to",
    "trust_remote_code",
    "env",
)


# What must be equal in two runs, in the order of a run, and where it is in `run.json`.
COMPARED = (
    ("base weights", ("base", "weights")),
    ("training rows", ("rows", "train", "sha256")),
    ("trained weights at the start", ("trained_at_start_sha256",)),
    ("order of the rows", ("order_sha256",)),
    ("steps", ("steps",)),
    ("trained weights at the end", ("weights", "sha256")),
)


@dataclass(frozen=True)
class Stage:
    """One comparison of two runs.

    Attributes:
        name: What is compared.
        equal: Whether it is equal.
        detail: How it differs, if it does.
    """

    name: str
    equal: bool
    detail: str = ""


@dataclass(frozen=True)
class RecordedRun:
    """How a finished run was started, from its `run.json`.

    Attributes:
        program: The program, by the file name in the recorded command.
        flags: The program's command line.
        config: The content of the recipe's YAML, if there was one.
        processes: Number of processes.
        threads: Number of PyTorch's threads in each.
        device: `cpu`, or the kind of accelerator.
        versions: The versions of the packages on which the result depends.
    """

    program: Program[Any]
    flags: list[str]
    config: dict[str, Any] | None
    processes: int
    threads: int
    device: str
    versions: dict[str, Any]


def _holds_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def read_recorded(folder: str | Path) -> RecordedRun:
    """How a finished run was started.

    Raises:
        UserError: The run did not finish, was not recorded, or its record is damaged.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; give the output_dir of a finished run")
    run = read_run(folder)
    if not run:
        raise UserError(f"{folder} has no run.json; give the output_dir of a finished run of recipes/*.py")
    for needed in ("command", "config", "processes", "threads", "weights", "order_sha256"):
        if needed not in run:
            reason = "its training did not finish" if "base" in run else "no finished run of recipes/*.py wrote it"
            raise UserError(f"{folder} cannot be reproduced: run.json has no {needed}; {reason}")
    command, config, versions, device = run["command"], run["config"], run.get("versions"), run.get("device")
    processes, threads = run["processes"], run["threads"]
    for name, right in (
        ("command", _holds_names(command) and bool(command) and Path(command[0]).name in PROGRAMS),
        ("config", isinstance(config, dict | None) and _holds_names((config or {}).get("env", []))),
        ("processes and threads", all(isinstance(count, int) and 0 < count <= MOST for count in (processes, threads))),
        ("device", isinstance(device, str)),
        ("versions", isinstance(versions, dict)),
    ):
        if not right:
            raise UserError(f"{folder} cannot be reproduced: the {name} in its run.json is not valid; train again")
    for _, path in COMPARED:
        _look_up(run, path, folder)
    program = PROGRAMS[Path(command[0]).name]
    return RecordedRun(program, command[1:], config, processes, threads, str(device), versions or {})


def remaining_flags(command: Sequence[str]) -> list[str]:
    """The flags of a command that a repetition keeps: all but `DROPPED`."""
    kept: list[str] = []
    words = list(command)
    while words:
        word = words.pop(0)
        name, given, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.replace("-", "_") not in DROPPED:
            kept.append(word)
        elif not given and words and not words[0].startswith("--"):
            words.pop(0)
    return kept


def _command(run: RecordedRun, program: Path, config: Path, output: Path, trust_remote_code: bool) -> list[str]:
    flags = [*remaining_flags(run.flags), "--output_dir", str(output), "--report_to", "none"]
    flags += ["--trust_remote_code", "true"] if trust_remote_code else []
    start = [sys.executable]
    if run.processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={run.processes}"]
    return [*start, str(program), *(["--config", str(config)] if config.is_file() else []), *flags]


def reproduce(
    folder: str | Path, output: str | Path, log: Callable[[str], object] = print, trust_remote_code: bool = False
) -> list[Stage]:
    """Repeats the run of a folder by its `run.json`. Call it in the working directory of the first run.

    The program is that of the checkout whose root is the working directory, never the one that `run.json` names.

    Args:
        folder: The folder of the first run.
        output: The folder of the second run; it must not exist.
        log: Called with a line for each package version that differs, and for environment variables of the recipe.
        trust_remote_code: Whether the model's own code may run.

    Raises:
        UserError: The first run did not finish or was not recorded, the working directory is not a checkout's root, or
            the second run fails.
    """
    folder, output = Path(folder), Path(output)
    run, versions = read_recorded(folder), package_versions()
    program = run.program.find()
    for name, then in run.versions.items():
        if then != versions.get(name):
            log(f"{name} was {then} and is {versions.get(name)}")
    if run.config and run.config.get("env"):
        log(f"its recipe set {', '.join(map(str, run.config['env']))}, whose values are not recorded: set them too")
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.yaml"
        if run.config is not None:
            kept = {name: value for name, value in run.config.items() if name not in DROPPED}
            config.write_text(yaml.safe_dump(kept), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": str(run.threads)}
        if run.device == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        command = _command(run, program, config, output, trust_remote_code)
        code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise UserError(f"the second run ended with exit code {code}{'' if code == EXIT_CODE else ', see above'}")
    return compare_runs(folder, output)


def compare_runs(first: str | Path, second: str | Path) -> list[Stage]:
    """Compares two finished runs, in the order of a run.

    Raises:
        UserError: One of them is not finished.
    """
    runs = [read_run(folder) for folder in (first, second)]
    stages = []
    for name, path in COMPARED:
        values = [_look_up(run, path, folder) for run, folder in zip(runs, (first, second), strict=True)]
        detail = " and ".join(str(value)[:12] for value in values)
        stages.append(Stage(name, values[0] == values[1], "" if values[0] == values[1] else detail))
    file = Path(first) / Path(str(_look_up(runs[0], ("weights", "file"), first))).name
    now = describe_weights(Path(first))["sha256"] if file.is_file() else "missing"
    if now != _look_up(runs[0], ("weights", "sha256"), first):
        stages.append(Stage(f"{file} as its run wrote it", False, f"it was changed since: {now[:12]}"))
    return stages


def _look_up(run: dict[str, Any], path: Sequence[str], folder: str | Path) -> Any:
    value: Any = run
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"{folder}/run.json has no {'.'.join(path)}; only finished runs can be compared")
        value = value[key]
    return value
