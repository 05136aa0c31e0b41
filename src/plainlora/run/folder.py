"""What a run's folder holds, and what of it may be replaced."""

import re
import shutil
from pathlib import Path

from plainlora.errors import UserError
from plainlora.folders import MANIFEST

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
WHOLE_MODEL = ("config.json", "model.safetensors")
PICTURES = ("loss.png", "confusion.png")
RESULTS = (*ADAPTER, *WHOLE_MODEL, MANIFEST, "trainer_state.json", "all_results.json", "run.json")
SAMPLES = "samples.md"
REPORTS = ("README.md", SAMPLES, *PICTURES, "merged")
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
    for name in ("README.md", SAMPLES, *PICTURES, *RESULTS):
        (Path(output_dir) / name).unlink(missing_ok=True)
