"""The files of a run's folder, and which of them may be replaced."""

import re
import shutil
from pathlib import Path

from plainlora.base.identity import find_weight_files
from plainlora.errors import UserError
from plainlora.folders import MANIFEST

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
WHOLE_MODEL = ("config.json", "model.safetensors")
INDEX = "model.safetensors.index.json"  # of a whole model in several files
SHARDS = "model-*-of-*.safetensors"
PICTURES = ("loss.png", "confusion.png")
RESULTS = (*ADAPTER, *WHOLE_MODEL, INDEX, MANIFEST, "trainer_state.json", "all_results.json", "run.json")
SAMPLES = "samples.md"
REPORTS = ("README.md", SAMPLES, *PICTURES, "merged")
UNFINISHED = ".saving"  # the subfolder in which a save is prepared; a kill leaves it behind


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


def weight_files(folder: str | Path) -> list[Path]:
    """The files of an adapter's weights or of a whole model's, which may be in several.

    Raises:
        UserError: One is missing.
    """
    if not holds_adapter(folder):
        return find_weight_files(str(folder))
    if not (file := Path(folder) / ADAPTER[1]).is_file():
        raise UserError(f"{file.name} is missing")
    return [file]


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that a kill leaves no incomplete checkpoint."""
    unfinished = checkpoint.parent / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    checkpoint.rename(unfinished / checkpoint.name)
    shutil.rmtree(unfinished)


def is_run(folder: Path) -> bool:
    """Whether a run wrote a folder. A README.md, or an adapter alone, does not show that."""
    return any((folder / name).is_file() for name in ("run.json", "trainer_state.json")) or bool(
        list_checkpoints(folder)
    )


def is_merged_model(folder: Path) -> bool:
    """Whether `merge_adapter` wrote this folder, so that it may be replaced."""
    return (folder / "certificate.json").is_file()


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is the folder or inside it; links are resolved."""
    return Path(path).expanduser().resolve().is_relative_to(Path(folder).resolve())


def claim_output_dir(output_dir: str | Path, overwrite: bool, resume: str | Path | None) -> None:
    """Checks that a run does not mix with, or silently replace, the content of its folder.

    Args:
        output_dir: The run's folder.
        overwrite: Whether an earlier run there may be replaced.
        resume: The checkpoint to resume. If it is in `output_dir`, the folder is the run's own.

    Raises:
        UserError: The folder holds another run and `overwrite` is off, or it holds files that no run wrote.
    """
    folder = Path(output_dir)
    if not folder.is_dir() or (resume is not None and lies_in(resume, folder)):
        return
    found = [name for name in (*RESULTS, *REPORTS) if (folder / name).exists()]
    found += [path.name for path in list_checkpoints(folder)]
    if not found:
        return
    names = ", ".join(sorted(found)[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    if not is_run(folder):
        raise UserError(f"{folder} is not a run's folder, but holds {names}; give another --output_dir")
    if not overwrite:
        raise UserError(
            f"{folder} holds another run ({names}); give another --output_dir, resume with "
            "--resume_from_checkpoint true, or replace it with --overwrite"
        )
    merged = folder / "merged"
    if merged.exists() and not (merged.is_dir() and (is_merged_model(merged) or not any(merged.iterdir()))):
        raise UserError(f"{merged} was not written by a run (it has no certificate.json); give another --output_dir")


def check_inputs_apart(output_dir: str | Path, inputs: dict[str, str | None]) -> None:
    """Checks that the run's folder does not contain what the run reads.

    Args:
        output_dir: The run's folder.
        inputs: The path or Hub id of each input, by a name for messages.

    Raises:
        UserError: An input is the folder, or in it.
    """
    for what, name in inputs.items():
        if name and Path(name).expanduser().exists() and lies_in(name, output_dir):
            raise UserError(f"output_dir {output_dir} is or holds the {what} {name}; give a folder of its own")


def clear_output_dir(output_dir: str | Path) -> None:
    """Removes an earlier run's results and checkpoints, and nothing else. Call it after all input is checked."""
    if not is_run(Path(output_dir)):
        return
    for checkpoint in list_checkpoints(output_dir):
        remove_checkpoint(checkpoint)
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)
    if is_merged_model(Path(output_dir) / "merged"):
        shutil.rmtree(Path(output_dir) / "merged")
    # run.json last, so that after an interruption the folder is still recognised as a run's.
    shards = [path.name for path in Path(output_dir).glob(SHARDS)]
    for name in ("README.md", SAMPLES, *PICTURES, *shards, *RESULTS):
        (Path(output_dir) / name).unlink(missing_ok=True)
