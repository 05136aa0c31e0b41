"""One recipe run in a process of its own; a run that is finished is not run again."""

import fcntl
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

from plainlora.errors import INTERRUPTED, UserError
from plainlora.interruption import end_with_parent
from plainlora.json_files import read_mapping
from plainlora.report import write_json
from plainlora.run.folder import list_checkpoints
from plainlora.settings.checks import check_writable
from plainlora.settings.parsing import read_yaml
from plainlora.settings.programs import CLASSIFY

METHODS = ("last_layers", "lora", "full")
RESULTS, RECORD = "all_results.json", "command.json"
QUIET = ("--disable_tqdm=true", "--report_to=none")  # flags after these win
OWN_FLAGS = {
    "config": "give it before the --",
    "output_dir": "give it before the --; every run has a folder of its own in it",
    "overwrite": "runs that are not finished are always made anew",
    "resume_from_checkpoint": "runs that are not finished are always made anew",
}


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        results: Its `all_results.json`.
        seconds: How long the process took; None if it was finished before.
    """

    results: dict[str, Any]
    seconds: float | None


def flag_names(flags: Sequence[str]) -> set[str]:
    """`["--lora_r", "4", "--seed=1"]` -> `{"lora_r", "seed"}`."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in flags if word.startswith("--")}


def resolve(config: str, flags: Sequence[str], refused: Mapping[str, str]) -> dict[str, Any]:
    """Every setting of a run by name: the recipe's default, what its YAML says, what a flag says.

    Args:
        config: The recipe's YAML.
        flags: What stands after the `--`, for every run.
        refused: Flags besides `OWN_FLAGS` that may not stand there, and what to do instead.

    Raises:
        UserError: A flag is refused or is none of the recipe's; the config cannot be read or names no method.
    """
    parser, names, reasons = CLASSIFY.parser(), flag_names(flags), OWN_FLAGS | dict(refused)
    for name in sorted(names & reasons.keys()):
        raise UserError(f"--{name} cannot stand after the --: {reasons[name]}")
    typed, unknown = parser.parse_known_args(list(flags))
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is no flag of {CLASSIFY.path}; its flags stand after a --, as in -- --bf16 true"
        )
    settings = vars(parser.parse_known_args([])[0]) | read_yaml(config)
    settings |= {name: value for name, value in vars(typed).items() if name in names}
    if settings["method"] not in METHODS:
        raise UserError(f"{config}: method is {', '.join(METHODS[:-1])} or {METHODS[-1]}, not {settings['method']!r}")
    return settings


def run_recipe(config: str, flags: Sequence[str], output_dir: Path) -> Outcome:
    """Runs `recipes/classify.py` in a process of its own, unless this very run is finished.

    Finished is a run whose results are there together with a record, written after its success, of the same flags and
    the same content of the config.

    Args:
        config: The recipe's YAML.
        flags: More of its flags, as typed.
        output_dir: The run's folder; what it prints goes to `output_dir.log` beside it.

    Raises:
        UserError: The program is not there or did not get to its end; or the config cannot be read.
    """
    program = CLASSIFY.find()
    try:
        digest = hashlib.sha256(Path(config).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{config} cannot be read: {error.strerror}") from error
    asked = {"config_sha256": digest, "flags": list(flags)}
    results, record = output_dir / RESULTS, output_dir / RECORD
    if _read(record) == asked and (found := _read(results)):
        return Outcome(found, None)

    record.unlink(missing_ok=True)  # before the results change, or it would vouch for another run's
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    log = output_dir.with_name(output_dir.name + ".log")
    command = [sys.executable, str(program), "--config", config, *QUIET, *flags, f"--output_dir={output_dir}"]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        # subprocess.run ends the child when anything, such as Ctrl-C, ends the waiting.
        code = subprocess.run(
            [*command, "--overwrite"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
            # A killed sweep must not leave a run behind that holds the GPU. One system call, which takes no lock.
            preexec_fn=partial(end_with_parent, signal.SIGKILL),
        ).returncode
    if code != 0:
        raise UserError(f"{_last_words(log, code)} (log: {log})")
    found = _read(results)
    if found is None:
        raise UserError(f"the run ended without {results} (log: {log})")
    for checkpoint in list_checkpoints(output_dir):  # nothing goes on from them, and they are most of the disk space
        shutil.rmtree(checkpoint)
    write_json(record, asked)
    return Outcome(found, time.monotonic() - started)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_mapping(path)
    except ValueError:
        return None


def _last_words(log: Path, code: int) -> str:
    """The program's own error; else the end of its traceback, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"the run was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"the run ended with exit code {code}"])[-1].strip()


@contextmanager
def held(output_dir: str) -> Iterator[Path]:
    """Makes sure that one command at a time works in a folder, and that Ctrl-C says how to go on.

    Raises:
        UserError: Another command is at work there, or the folder cannot be written to.
    """
    check_writable(output_dir, "--output_dir")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # the system lets go of it however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another command is at work in {folder}; wait, or give another --output_dir") from error
        try:
            yield folder
        except KeyboardInterrupt as error:
            sys.stdout.flush()
            print("interrupted; what is finished is kept, and the same command goes on", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from error


def duration(seconds: float) -> str:
    """Seconds for people: `48 s`, `12 min`, `3.1 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
