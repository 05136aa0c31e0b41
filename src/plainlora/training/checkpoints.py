"""Checkpoints of a run: the newest whole one, and what may be replaced."""

import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from plainlora.errors import UserError
from plainlora.folders import MANIFEST, find_damage
from plainlora.json_files import read_mapping

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
WHOLE_MODEL = ("config.json", "model.safetensors")
PICTURES = ("loss.png", "confusion.png")
RESULTS = (*ADAPTER, *WHOLE_MODEL, MANIFEST, "trainer_state.json", "all_results.json", "run.json")
REPORTS = ("README.md", *PICTURES, "merged")
STATES = ("optimizer.pt", "scheduler.pt")
STATE_KINDS: dict[str, tuple[type, ...]] = {  # of Trainer's state, where it is no number
    **dict.fromkeys(("best_metric", "best_global_step"), (int, float, NoneType)),
    **dict.fromkeys(("best_model_checkpoint", "trial_name"), (str, NoneType)),
    **dict.fromkeys(("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search"), (bool,)),
    **dict.fromkeys(("stateful_callbacks", "trial_params"), (dict, NoneType)),
    "log_history": (list, NoneType),
}
UNFINISHED = ".saving"  # where a save is prepared, within the run's folder; what a kill in the middle leaves


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The run's `checkpoint-N` folders, oldest first."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def holds_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (Path(folder) / "adapter_config.json").is_file()


def find_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed, in one clause; `None` if it can.

    Every file is there, has its end, holds what Trainer reads from it, and is what the manifest says. A checkpoint of
    elsewhere has no manifest, so a bit that flipped in it is not seen.
    """
    description, weights = ADAPTER if holds_adapter(checkpoint) else WHOLE_MODEL
    generators = sorted(path.name for path in checkpoint.glob("rng_state*.pth")) or ["rng_state.pth"]  # one a process
    scaler = [path.name for path in checkpoint.glob("scaler.pt")]  # under fp16
    states = [*STATES, *generators, *scaler]
    for name in ("trainer_state.json", description, weights, *states):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        state, _ = (read_mapping(checkpoint / name) for name in ("trainer_state.json", description))
        if fault := _find_fault(state, checkpoint):
            return f"trainer_state.json {fault}"
        for name in states:
            if not _holds_plain_values(checkpoint / name):
                return f"{name} is cut short, or holds more than numbers and text, which could run code"
        with safe_open(checkpoint / weights, framework="pt") as tensors:
            if not tensors.keys():
                return f"{weights} is empty"
    except (SafetensorError, OSError, ValueError) as error:
        return f"a file is damaged: {error}"
    return find_damage(checkpoint)


def _find_fault(state: dict[str, Any], checkpoint: Path) -> str | None:
    """What Trainer would stumble over in a `trainer_state.json`, or take on faith."""
    if missing := sorted({"global_step", "train_batch_size"} - state.keys()):
        return f"names no {missing[0]}"
    if unknown := sorted(state.keys() - {field.name for field in fields(TrainerState)}):
        return f"holds {unknown[0]!r:.60}, which Trainer has no place for"
    for name, value in state.items():
        if type(value) not in STATE_KINDS.get(name, (int, float)):
            return f"says that {name} is {value!r:.60}"
    step, number = state["global_step"], re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if not isinstance(step, int) or step < 0 or (number is not None and step != int(number[1])):
        return f"says that global_step is {step!r:.60}"
    for entry in state.get("log_history") or []:
        if not isinstance(entry, dict) or not {*map(type, entry.values())} <= {int, float, NoneType}:
            return f"holds {entry!r:.60} in log_history"
    return None


def _holds_plain_values(path: Path) -> bool:
    """Whether PyTorch loads a file without running code of it. No number is read, so that it takes no time."""
    try:
        with safe_globals():
            torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # of any kind: a pickle is a program
        return False
    return True


def newest_checkpoint(output_dir: str | Path, say: Callable[[str], object] | None = None) -> Path | None:
    """The newest whole checkpoint. A broken newer one is passed over.

    Args:
        output_dir: Of the run.
        say: Told of each that is passed over, and why.
    """
    for path in reversed(list_checkpoints(output_dir)):
        problem = find_problem(path)
        if problem is None:
            return path
        if say is not None:
            say(f"{path} is passed over: {problem}")
    return None


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint. It loses its name first, so that a kill leaves no part of it there."""
    unfinished = checkpoint.parent / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    checkpoint.rename(unfinished / checkpoint.name)
    shutil.rmtree(unfinished)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's; a README.md, or an adapter from elsewhere, does not make it one."""
    return any((folder / name).is_file() for name in ("run.json", "trainer_state.json")) or bool(
        list_checkpoints(folder)
    )


def is_merged_model(folder: Path) -> bool:
    """Whether `merge_adapter` wrote this folder, so that it may be replaced."""
    return (folder / "certificate.json").is_file()


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is a folder or below it, links followed."""
    return Path(path).expanduser().resolve().is_relative_to(Path(folder).resolve())


def claim_output_dir(output_dir: str | Path, overwrite: bool, resume: str | Path | None) -> None:
    """Makes sure that a run cannot mix with, or silently replace, what is in its folder.

    Args:
        output_dir: Where the run writes.
        overwrite: Whether an earlier run there may be replaced.
        resume: The checkpoint that the run goes on from. One in `output_dir` belongs with what is there.

    Raises:
        UserError: The folder holds another run and `overwrite` is off, or it holds what no run can have written.
    """
    folder = Path(output_dir)
    if not folder.is_dir() or (resume is not None and lies_in(resume, folder)):
        return
    found = [name for name in (*RESULTS, *REPORTS) if (folder / name).exists()]
    found += [path.name for path in list_checkpoints(folder)]
    if not found:
        return
    names = ", ".join(sorted(found))
    if not is_run(folder):
        raise UserError(f"{folder} is not a run's folder, but holds {names}; give another --output_dir")
    if not overwrite:
        raise UserError(
            f"{folder} holds another run ({names}); give another --output_dir, go on with "
            "--resume_from_checkpoint true, or replace it with --overwrite"
        )
    merged = folder / "merged"
    if merged.exists() and not (merged.is_dir() and (is_merged_model(merged) or not any(merged.iterdir()))):
        raise UserError(f"{merged} was not written by a run (it has no certificate.json); give another --output_dir")


def check_inputs_apart(output_dir: str | Path, inputs: dict[str, str | None]) -> None:
    """The run's folder may not be, or hold, what the run reads.

    Args:
        output_dir: Where the run writes.
        inputs: What each input is, and its path or Hub id.

    Raises:
        UserError: One of them lies in the folder.
    """
    for what, name in inputs.items():
        if name and Path(name).expanduser().exists() and lies_in(name, output_dir):
            raise UserError(f"output_dir {output_dir} is or holds the {what} {name}; give a folder of its own")


def clear_output_dir(output_dir: str | Path) -> None:
    """Removes an earlier run's results and checkpoints, and nothing else. Called once all input has been checked."""
    if not is_run(Path(output_dir)):
        return
    for checkpoint in list_checkpoints(output_dir):
        remove_checkpoint(checkpoint)
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)
    if is_merged_model(Path(output_dir) / "merged"):
        shutil.rmtree(Path(output_dir) / "merged")
    # run.json last: a clearing that is cut short leaves a folder that can still be told to be a run's.
    for name in ("README.md", *PICTURES, *RESULTS):
        (Path(output_dir) / name).unlink(missing_ok=True)
