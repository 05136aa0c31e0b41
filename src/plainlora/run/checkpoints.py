"""Finds the newest checkpoint that is complete and undamaged, from which a run can resume."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from plainlora.errors import UserError
from plainlora.folders import find_damage
from plainlora.json_files import read_mapping
from plainlora.run.folder import ADAPTER, WHOLE_MODEL, holds_adapter, list_checkpoints, weight_files

STATES = ("optimizer.pt", "scheduler.pt")
STATE_TYPES: dict[str, tuple[type, ...]] = {  # of the fields of Trainer's state that are not numbers
    **dict.fromkeys(("best_metric", "best_global_step"), (int, float, NoneType)),
    **dict.fromkeys(("best_model_checkpoint", "trial_name"), (str, NoneType)),
    **dict.fromkeys(("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search"), (bool,)),
    **dict.fromkeys(("stateful_callbacks", "trial_params"), (dict, NoneType)),
    "log_history": (list, NoneType),
}


def find_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed, in one clause; `None` if it can.

    Every file must be there and complete, hold what Trainer reads from it, and match the manifest. A checkpoint that
    another program wrote has no manifest, so a flipped bit in it is not seen.
    """
    description, _ = ADAPTER if holds_adapter(checkpoint) else WHOLE_MODEL
    generators = sorted(path.name for path in checkpoint.glob("rng_state*.pth")) or [
        "rng_state.pth"
    ]  # of each process
    scaler = [path.name for path in checkpoint.glob("scaler.pt")]  # under fp16
    states = [*STATES, *generators, *scaler]
    for name in ("trainer_state.json", description, *states):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        state, _ = (read_mapping(checkpoint / name) for name in ("trainer_state.json", description))
        if fault := _find_fault(state, checkpoint):
            return f"trainer_state.json {fault}"
        for name in states:
            if not _holds_plain_values(checkpoint / name):
                return f"{name} is cut short, or holds more than numbers and text, which could run code"
        for weights in weight_files(checkpoint):
            with safe_open(weights, framework="pt") as tensors:
                if not tensors.keys():
                    raise ValueError(f"{weights.name} is empty")
    except UserError as error:
        return str(error)
    except (SafetensorError, OSError, ValueError) as error:
        return f"a file is damaged: {error}"
    return find_damage(checkpoint)


def _find_fault(state: dict[str, Any], checkpoint: Path) -> str | None:
    """What is wrong with a `trainer_state.json`, which Trainer itself does not check."""
    if missing := sorted({"global_step", "train_batch_size"} - state.keys()):
        return f"names no {missing[0]}"
    if unknown := sorted(state.keys() - {field.name for field in fields(TrainerState)}):
        return f"holds {unknown[0]!r:.60}, which Trainer has no place for"
    for name, value in state.items():
        if type(value) not in STATE_TYPES.get(name, (int, float)):
            return f"says that {name} is {value!r:.60}"
    step, number = state["global_step"], re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if not isinstance(step, int) or step < 0 or (number is not None and step != int(number[1])):
        return f"says that global_step is {step!r:.60}"
    for entry in state.get("log_history") or []:
        if not isinstance(entry, dict) or not {*map(type, entry.values())} <= {int, float, NoneType}:
            return f"holds {entry!r:.60} in log_history"
    return None


def _holds_plain_values(path: Path) -> bool:
    """Whether PyTorch loads a file without running its code. On the meta device no number is read."""
    try:
        with safe_globals():
            torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # of any class: a pickle is a program
        return False
    return True


def newest_checkpoint(output_dir: str | Path, log: Callable[[str], object] | None = None) -> Path | None:
    """The newest checkpoint that can be resumed; broken ones are passed over.

    Args:
        output_dir: The run's folder.
        log: Called with one line for each checkpoint that is passed over.
    """
    for path in reversed(list_checkpoints(output_dir)):
        problem = find_problem(path)
        if problem is None:
            return path
        if log is not None:
            log(f"{path} is passed over: {problem}")
    return None


def resume_path(args: TrainingArguments, log: Callable[[str], object] = print) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, or with `true` the newest that can be resumed.

    Args:
        args: The run's arguments.
        log: Called with one line for each checkpoint that is passed over.

    Raises:
        UserError: There is no such checkpoint.
    """
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() in ("false", "no"):
        return None
    if str(asked).lower() in ("true", "yes"):
        newest = newest_checkpoint(str(args.output_dir), log)
        if newest is None:
            raise UserError(
                f"resume_from_checkpoint: {args.output_dir} holds no whole checkpoint; leave it out to start"
            )
        _check_steps_left(newest, args, log)
        return str(newest)
    if not (Path(asked) / "trainer_state.json").is_file():
        raise UserError(f"resume_from_checkpoint: {asked} is not a checkpoint folder; it has no trainer_state.json")
    if problem := find_problem(Path(asked)):
        raise UserError(
            f"resume_from_checkpoint: {asked} is not whole: {problem}; give another checkpoint, or `true` for the "
            "newest whole one of output_dir"
        )
    _check_steps_left(Path(asked), args, log)
    return str(asked)


def _check_steps_left(checkpoint: Path, args: TrainingArguments, log: Callable[[str], object]) -> None:
    """Logs if no step is left to train; raises `UserError` if the checkpoint is beyond `max_steps`."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    end = args.max_steps
    if end <= 0 and args.num_train_epochs == state.num_train_epochs:
        end = state.max_steps
    if 0 < args.max_steps < state.global_step:
        raise past_the_end(checkpoint, state.global_step, args.max_steps)
    if state.global_step == end:
        log(f"{checkpoint} is at the last step, {end}: nothing is left to train; what follows training is done again")


def past_the_end(checkpoint: object, step: int, end: int) -> UserError:
    """The error for a checkpoint of a later step than the run's last one."""
    return UserError(
        f"resume_from_checkpoint: {checkpoint} is at step {step} already, and the run ends at step {end}; raise "
        "max_steps or num_train_epochs, or take an earlier checkpoint"
    )
