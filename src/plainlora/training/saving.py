"""Saves Trainer's checkpoints and its final result atomically."""

import errno
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainingArguments

from plainlora.backends import count_of
from plainlora.errors import UserError, first_line
from plainlora.folders import check_disk, move_in, put_in_place
from plainlora.run.folder import UNFINISHED, list_checkpoints, remove_checkpoint

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = (
    *("No space left", "File too large", "Disk quota"),
    *(
        "PytorchStreamWriter",
        "unexpected pos",
        "iostream error",
    ),  # torch.save, which hides the system's error
)
OPTIMIZER_COPIES = 2  # Adam's two moments of every trained weight


def _is_full(error: Exception) -> bool:
    """Whether an error is one of a full disk. PyTorch and safetensors pass it on as text."""
    return getattr(error, "errno", None) in FULL or any(text in str(error) for text in FULL_TEXTS)


def saved_bytes(model: nn.Module, whole: bool) -> int:
    """Bytes of the saved weights.

    Args:
        model: The trained model.
        whole: Whether all weights are saved, or the trained ones alone.
    """
    return sum(count_of(each) * each.itemsize for each in model.parameters() if each.requires_grad or whole)


def checkpoint_bytes(model: nn.Module, whole: bool) -> int:
    """Bytes of the saved weights and the optimizer's state."""
    return saved_bytes(model, whole) + OPTIMIZER_COPIES * saved_bytes(model, whole=False)


def check_room(training: TrainingArguments, model: nn.Module, whole: bool, merged: int) -> None:
    """Checks, before anything is written, that the run's output fits on the disk.

    Args:
        training: The output folder, and whether checkpoints are saved.
        model: The model to be trained.
        whole: Whether all weights are saved, or the trained ones alone.
        merged: Bytes of the merged model; 0 if there will be none.

    Raises:
        UserError: A checkpoint, the final save and the merged model do not fit.
    """
    checkpoint = 0 if training.save_strategy == "no" else checkpoint_bytes(model, whole)
    what = "a checkpoint, the result and the merged model" if merged else "a checkpoint and the result"
    folder = str(training.output_dir)
    check_disk(folder, checkpoint + saved_bytes(model, whole) + merged, f"{what} in {folder}")


class AtomicSaves(Trainer):
    """Trainer that prepares every save in `output_dir/.saving`, flushes it, adds a manifest, and renames it.

    Trainer itself writes one file after the other into the final folder:
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py (`_save_checkpoint`)
    """

    adapted: nn.Module  # without the trainer's wrappers
    saves_all: bool  # every weight, or the trained ones alone
    _preparing = False

    def _run_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        """The folder in which `checkpoint-N` is written: `.saving` until it is complete."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self._preparing else folder

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As Trainer's, without two files.

        `training_args.bin` is a pickle that holds the Hub's token; `run.json` has the arguments. PEFT's model card
        would be overwritten later and then not match the manifest.
        """
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self._run_dir())
        (folder / "training_args.bin").unlink(missing_ok=True)
        if UNFINISHED in folder.parts:
            (folder / "README.md").unlink(missing_ok=True)

    def _begin(self, what: str, needed: int) -> Path:
        """An empty folder in which to prepare a save, the same for all processes."""
        scratch = self._run_dir() / UNFINISHED
        if self.args.should_save:
            check_disk(self._run_dir(), needed, what)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        return scratch

    def _failed(self, what: str, error: Exception) -> UserError:
        if self.args.should_save:
            shutil.rmtree(self._run_dir() / UNFINISHED, ignore_errors=True)
        return UserError(
            f"{what} could not be written ({first_line(error)}); what was saved before is untouched; make "
            "room, and resume with --resume_from_checkpoint true"
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """As Trainer's, by which every process writes a file; the main process writes when the others have.

        If it fails, it removes the folder. The others must then be waiting for it, not writing there.
        """
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.accelerator.wait_for_everyone()
            super()._save_rng_state(output_dir)
        else:
            super()._save_rng_state(output_dir)
            self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but atomically.

        Raises:
            UserError: The disk is too small, or became full. Earlier checkpoints are unchanged.
        """
        run, name = self._run_dir(), f"checkpoint-{self.state.global_step}"
        scratch = self._begin(f"{run / name}", checkpoint_bytes(self.adapted, self.saves_all))
        self._preparing = True
        try:
            self._write_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._name_best_checkpoint(scratch / name)
            if self.args.should_save:
                put_in_place(scratch / name, run / name)
                scratch.rmdir()
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_full(error):
                raise
            raise self._failed(str(run / name), error) from error
        finally:
            self._preparing = False
        if self.args.should_save:
            self._remove_old_checkpoints({name, Path(self.state.best_model_checkpoint or "").name})
        self.accelerator.wait_for_everyone()

    def _remove_old_checkpoints(self, kept: set[str]) -> None:
        """As Trainer's `rotate_checkpoints` for `save_total_limit`, but each is removed atomically."""
        if limit := max(0, self.args.save_total_limit or 0):
            checkpoints = list_checkpoints(self._run_dir())
            old = [path for path in checkpoints if path.name not in kept]
            for path in old[: max(0, len(checkpoints) - limit)]:
                remove_checkpoint(path)

    def _name_best_checkpoint(self, checkpoint: Path) -> None:
        """Corrects the path of the best checkpoint in every process's state: Trainer looks for it in `.saving`."""
        if self.state.best_global_step:
            best = self._run_dir() / f"checkpoint-{self.state.best_global_step}"
            if best.name == checkpoint.name or best.exists():
                self.state.best_model_checkpoint = str(best)
                if self.args.should_save:
                    self.state.save_to_json(str(checkpoint / "trainer_state.json"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; the final save, without an `output_dir`, goes beside the run's other files.

        Raises:
            UserError: The disk is too small for the final save, or became full.
        """
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        scratch = self._begin(f"the final save in {self._run_dir()}", saved_bytes(self.adapted, self.saves_all))
        try:
            super().save_model(str(scratch), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_in(scratch, self._run_dir())
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_full(error):
                raise
            raise self._failed(f"the final save in {self._run_dir()}", error) from error
        self.accelerator.wait_for_everyone()
