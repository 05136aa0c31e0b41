"""A run made again from its `run.json`, and compared with itself byte for byte."""

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
from plainlora.folders import sha256_of
from plainlora.provenance.adapter_base import read_run
from plainlora.report import package_versions

PROGRAMS = Path(__file__).parents[3] / "recipes"
DROPPED = ("config", "output_dir", "resume_from_checkpoint", "push_to_hub", "merge", "overwrite", "report_to")


@dataclass(frozen=True)
class Stage:
    """One thing that two runs should share.

    Attributes:
        name: Of the thing.
        equal: Whether they do.
        detail: How they differ, if they do.
    """

    name: str
    equal: bool
    detail: str = ""


def remaining_flags(command: Sequence[str]) -> list[str]:
    """The flags of a command that a repetition keeps: not where it writes, nor what comes after training."""
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


def _command(run: dict[str, Any], config: Path, output: Path) -> list[str]:
    program = PROGRAMS / Path(str(run["command"][0])).name
    if not program.is_file():
        raise UserError(f"there is no {program}; work in a checkout of the repository, installed with make install")
    flags = [*remaining_flags(run["command"][1:]), "--output_dir", str(output), "--report_to", "none"]
    start = [sys.executable]
    if run["processes"] > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={run['processes']}"]
    return [*start, str(program), *(["--config", str(config)] if config.is_file() else []), *flags]


def reproduce(folder: str | Path, output: str | Path, say: Callable[[str], object] = print) -> list[Stage]:
    """Trains again what a folder's `run.json` describes, from the folder in which the first run was started.

    Args:
        folder: Of the first run.
        output: Where the second run writes; it must not exist.
        say: Told of versions and settings that differ already.

    Raises:
        UserError: The first run did not end, was not recorded, or the second one fails.
    """
    folder, output = Path(folder), Path(output)
    run = read_run(folder)
    for needed in ("command", "config", "processes", "threads", "weights", "order_sha256"):
        if needed not in run:
            reason = "its training did not end" if "base" in run else "no finished run of recipes/*.py wrote it"
            raise UserError(f"{folder} cannot be made again: run.json has no {needed}; {reason}")
    changed = {name: (then, package_versions().get(name)) for name, then in run["versions"].items()}
    for name, (then, now) in changed.items():
        if then != now:
            say(f"{name} was {then} and is {now}")
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.yaml"
        if run["config"] is not None:
            kept = {name: value for name, value in run["config"].items() if name not in DROPPED}
            config.write_text(yaml.safe_dump(kept), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": str(run["threads"])}
        if run["device"] == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        code = subprocess.run(_command(run, config, output), env=environment, check=False).returncode
    if code:
        raise UserError(f"the second run ended with exit code {code}{'' if code == EXIT_CODE else ', see above'}")
    return compare_runs(folder, output)


def compare_runs(first: str | Path, second: str | Path) -> list[Stage]:
    """Sets two finished runs side by side, in the order in which one thing follows from another.

    Raises:
        UserError: One of them is not finished.
    """
    runs = [read_run(folder) for folder in (first, second)]
    stages = []
    for name, path in (
        ("base weights", ("base", "weights")),
        ("training rows", ("rows", "train", "sha256")),
        ("trained weights at the start", ("trained_at_start_sha256",)),
        ("order of the rows", ("order_sha256",)),
        ("steps", ("steps",)),
        ("trained weights at the end", ("weights", "sha256")),
    ):
        values = [_look_up(run, path, folder) for run, folder in zip(runs, (first, second), strict=True)]
        detail = " and ".join(str(value)[:12] for value in values)
        stages.append(Stage(name, values[0] == values[1], "" if values[0] == values[1] else detail))
    file = Path(first) / runs[0]["weights"]["file"]
    now = sha256_of(file) if file.is_file() else "missing"
    if now != runs[0]["weights"]["sha256"]:
        stages.append(Stage(f"{file} as its run wrote it", False, f"it was changed since: {now[:12]}"))
    return stages


def _look_up(run: dict[str, Any], path: Sequence[str], folder: str | Path) -> Any:
    value: Any = run
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"{folder}/run.json has no {'.'.join(path)}; only finished runs can be compared")
        value = value[key]
    return value
