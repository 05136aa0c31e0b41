"""One run of a program: claims its folder, writes its record, trains and saves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from torch import nn

from plainlora.backends import check_same_adapter
from plainlora.base.identity import describe_base
from plainlora.resources.memory import peak_memory, reset_peak_memory
from plainlora.run.checkpoints import resume_path
from plainlora.run.folder import check_inputs_apart, claim_output_dir, clear_output_dir, lies_in
from plainlora.run.parent import Parent
from plainlora.run.record import complete_run, write_run
from plainlora.run.resumption import check_same_rows, check_same_settings
from plainlora.settings.programs import Settings


@dataclass
class Run:
    """A run and its folder.

    Attributes:
        settings: The program's settings.
        folder: `output_dir`.
        checkpoint: The checkpoint that is resumed; `None` for a new run.
        log: Prints a line in the main process.
        record: The content of `run.json`; empty before `begin`, and in all processes but the main one.
    """

    settings: Settings[Any, Any]
    folder: Path
    checkpoint: str | None
    log: Callable[[str], None]
    record: dict[str, Any]

    @property
    def merged(self) -> Path:
        """The folder of the merged model."""
        return self.folder / "merged"

    @classmethod
    def claim(cls, settings: Settings[Any, Any]) -> "Run":
        """Checks that the run may write to its folder. Nothing is written yet.

        Raises:
            UserError: The folder holds another run or what the run reads, or the checkpoint cannot be resumed.
        """
        log, training = PartialState().print, settings.training
        check_inputs_apart(training.output_dir, settings.inputs)
        checkpoint = resume_path(training, log)
        claim_output_dir(training.output_dir, settings.recipe.overwrite, resume=checkpoint)
        return cls(settings, Path(training.output_dir), checkpoint, log, {})

    def check_resumable(self, rows: Dataset, lora: LoraConfig | None, labels: Sequence[str] | None = None) -> None:
        """Checks that the run continues the one of its checkpoint, if it has one.

        Args:
            rows: Training rows.
            lora: The adapter's config; `None` without an adapter.
            labels: Names of a classifier's classes, in order.

        Raises:
            UserError: The adapter, the settings, the classes or the rows differ.
        """
        if self.checkpoint is None:
            return
        if lora is not None:
            check_same_adapter(self.checkpoint, lora)
        check_same_settings(self.checkpoint, self.settings.parts, labels)
        check_same_rows(self.checkpoint, rows)

    def begin(
        self,
        model: nn.Module,
        rows: Mapping[str, Dataset | None],
        quantization: dict[str, Any] | None,
        labels: Sequence[str] | None = None,
        parent: Parent | None = None,
        backend: str | None = None,
    ) -> None:
        """Clears the folder of an earlier run and writes `run.json`. The last step before training.

        Args:
            model: The model with its initial adapter.
            rows: The encoded rows of every split.
            quantization: The base's quantisation.
            labels: Names of a classifier's classes, in order.
            parent: The adapter that is trained on.
            backend: The name of the back end that trains the adapter.
        """
        state, settings = PartialState(), self.settings
        if state.is_main_process:
            trust = bool(getattr(settings.training, "trust_remote_code", False))
            identity = describe_base(settings.base, settings.model.model_revision, trust)
            if not (self.checkpoint and lies_in(self.checkpoint, self.folder)):
                clear_output_dir(self.folder)
            self.record = write_run(
                self.folder / "run.json",
                settings.parts,
                quantization=quantization,
                base=identity,
                rows=rows,
                model=model,
                labels=labels,
                parent=None if parent is None else parent.describe(),
                backend=backend,
            )
        state.wait_for_everyone()

    def train(self, trainer: Any) -> dict[str, Any]:
        """Trains, resuming the checkpoint if there is one.

        Args:
            trainer: One of `plainlora.training.trainers`.

        Returns:
            The trainer's own figures, and the peak memory of training.
        """
        device = self.settings.training.device
        reset_peak_memory(device)
        outcome = trainer.train(resume_from_checkpoint=self.checkpoint)
        return {**outcome.metrics, **peak_memory(device)}

    def save(self, trainer: Any) -> None:
        """Writes the trained model or adapter and the trainer's state, and completes the record.

        Args:
            trainer: One of `plainlora.training.trainers`, after training.

        Raises:
            UserError: A trained weight is not finite, an adapter changes nothing, or the disk is too small.
        """
        trainer.save_model()
        trainer.save_state()
        if PartialState().is_main_process:
            complete_run(self.folder / "run.json", self.record, trainer.seen.digest, trainer.state.global_step)
