"""Runs a recipe in another process, unless the same run is finished already."""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from plainlora.errors import INTERRUPTED, UserError
from plainlora.interruption import end_with_parent
from plainlora.json_files import read_mapping
from plainlora.report import write_json
from plainlora.run.folder import list_checkpoints
from plainlora.settings.checks import check_writable
from plainlora.settings.parsing import read_yaml
from plainlora.settings.programs import find_program
from plainlora.settings.secrets import without_secrets

FINETUNING_MODES = ("last_layers", "lora", "full")
RESULTS, RECORD = "all_results.json", "command.json"
QUIET = (  # overridden by later flags
    *("--disable_tqdm=true", "--report_to=none", "--merge=false", "--push_to_hub=false"),
)
OWN_FLAGS = {
    "config": "give it before the --",
    "output_dir": "give it before the --; every run has a folder of its own in it",
    "overwrite": "runs that are not finished always start from the beginning",
    "resume_from_checkpoint": "runs that are not finished always start from the beginning",
    "push_to_hub": "no run is published here; publish the one that you keep with plainlora push",
}


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        results: The content of its `all_results.json`.
        seconds: Duration of the process, in seconds; `None` if the run was finished before.
    """

    results: dict[str, Any]
    seconds: float | None


def flag_names(flags: Sequence[str]) -> set[str]:
    """`["--lora_r", "4", "--seed=1"]` -> `{"lora_r", "seed"}`."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in flags if word.startswith("--")}


def resolve(config: str, flags: Sequence[str], refused: Mapping[str, str]) -> dict[str, Any]:
    """Every setting of a run by name: the default, overridden by the YAML, overridden by a flag.

    Args:
        config: The recipe's YAML.
        flags: The flags after the `--`, for every run.
        refused: Flags besides `OWN_FLAGS` that are refused there, and what to do instead.

    Raises:
        UserError: A flag is refused or unknown; the config cannot be read, or has an unknown method.
    """
    names, reasons = flag_names(flags), OWN_FLAGS | dict(refused)
    for name in sorted(names & reasons.keys()):
        raise UserError(f"--{name} cannot stand after the --: {reasons[name]}")
    given, program = read_yaml(config), find_program(config, flags)
    parser = program.parser()
    typed, unknown = parser.parse_known_args(list(flags))
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is not a flag of {program.path}; its flags stand after a --, as in -- --bf16 true"
        )
    settings = vars(parser.parse_known_args([])[0]) | given
    settings |= {name: value for name, value in vars(typed).items() if name in names}
    if settings["method"] not in FINETUNING_MODES:
        modes = f"{', '.join(FINETUNING_MODES[:-1])} or {FINETUNING_MODES[-1]}"
        raise UserError(f"{config}: method is {modes}, not {settings['method']!r}")
    return settings


def run_recipe(config: str, flags: Sequence[str], output_dir: Path) -> Outcome:
    """Runs the program of a recipe in another process, unless the same run is finished.

    A run is finished if its results exist, and a record, written after it succeeded, has the same flags and the same
    config.

    Args:
        config: The recipe's YAML.
        flags: More of the recipe's flags.
        output_dir: The run's folder; its output goes to `output_dir.log` beside it.

    Raises:
        UserError: The program is missing or failed, or the config cannot be read.
    """
    program = find_program(config, flags).find()
    try:
        digest = hashlib.sha256(Path(config).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{config} cannot be read: {error.strerror}") from error
    asked = {"config_sha256": digest, "flags": without_secrets(flags)}
    results, record = output_dir / RESULTS, output_dir / RECORD
    if _read(record) == asked and (found := _read(results)):
        return Outcome(found, None)

    record.unlink(missing_ok=True)  # removed first, so that it never matches results of another run
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    log = output_dir.with_name(output_dir.name + ".log")
    command = [sys.executable, str(program), "--config", config, *QUIET, *flags, f"--output_dir={output_dir}"]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        # subprocess.run kills the child if it is interrupted, for example by Ctrl-C.
        code = subprocess.run(
            [*command, "--overwrite"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
            # A killed sweep must not leave a run behind that holds the GPU. It is one system call, without locks.
            preexec_fn=partial(end_with_parent, signal.SIGKILL) if sys.platform == "linux" else None,
        ).returncode
    if code != 0:
        raise UserError(f"{_failure_reason(log, code)} (log: {log})")
    found = _read(results)
    if found is None:
        raise UserError(f"the run ended without {results} (log: {log})")
    for checkpoint in list_checkpoints(output_dir):  # they are not resumed, and take most of the disk space
        shutil.rmtree(checkpoint)
    write_json(record, asked)
    return Outcome(found, time.monotonic() - started)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_mapping(path)
    except ValueError:
        return None


def _failure_reason(log: Path, code: int) -> str:
    """The program's last error line, else the last line of its log, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"the run was ended by {name}" + (", perhaps because memory ran out" if name == "SIGKILL" else "")
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"the run ended with exit code {code}"])[-1].strip()


@contextmanager
def locked_folder(output_dir: str) -> Iterator[Path]:
    """Locks a folder for one command at a time; Ctrl-C prints how to continue.

    Raises:
        UserError: Another command works there, or the folder cannot be written to.
    """
    check_writable(output_dir, "--output_dir")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):  # released by the system even if this process is killed
            yield folder
    except Timeout as error:
        raise UserError(f"another command is at work in {folder}; wait, or give another --output_dir") from error
    except KeyboardInterrupt as error:
        sys.stdout.flush()
        print("interrupted; what is finished is kept, and the same command continues", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error


def duration(seconds: float) -> str:
    """A duration for a message: `48 s`, `12 min`, `3.1 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
