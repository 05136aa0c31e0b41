"""Checkpoints of a run: the newest whole one, and what may be replaced."""

import json
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from plainlora.errors import UserError

RESULTS = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "all_results.json", "run.json")
DESCRIPTIONS = ("trainer_state.json", "adapter_config.json")
STATES = ("optimizer.pt", "scheduler.pt")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The run's `checkpoint-N` folders, oldest first."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint can be resumed: every file is there and has its end (a zip's directory stands there)."""
    try:
        for name in DESCRIPTIONS:
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        if not all(zipfile.is_zipfile(checkpoint / name) for name in STATES):
            return False
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as tensors:
            return len(tensors.keys()) > 0
    except (SafetensorError, OSError, ValueError):
        return False


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint; a broken newer one, as a killed run leaves it, is passed over."""
    return next((path for path in reversed(list_checkpoints(output_dir)) if is_whole(path)), None)


def claim_output_dir(output_dir: str | Path, overwrite: bool, resume: bool) -> None:
    """Makes sure that a new run cannot mix with, or silently replace, another run's files.

    Raises:
        UserError: The folder holds another run's results, and neither `--overwrite` nor a resume was asked for.
    """
    folder = Path(output_dir)
    if resume or not folder.is_dir():
        return
    results = [folder / name for name in RESULTS if (folder / name).exists()] + list_checkpoints(folder)
    if results and not overwrite:
        raise UserError(
            f"{folder} holds another run ({', '.join(sorted(path.name for path in results))}); give another "
            "--output_dir, go on with --resume_from_checkpoint true, or replace it with --overwrite"
        )


def clear_output_dir(output_dir: str | Path) -> None:
    """Removes an earlier run's results and checkpoints, and nothing else. Called once all input has been checked."""
    for path in list_checkpoints(output_dir):
        shutil.rmtree(path)
    if (Path(output_dir) / "merged" / "merge.json").exists():
        shutil.rmtree(Path(output_dir) / "merged")
    for name in (*RESULTS, "README.md", "loss.png"):
        (Path(output_dir) / name).unlink(missing_ok=True)
