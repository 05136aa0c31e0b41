"""A whole recipe, examined past every error. No weight is loaded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from plainlora.doctor.classifier import examine_classifier
from plainlora.doctor.diagnosis import Diagnosis
from plainlora.doctor.finding import Examination
from plainlora.doctor.language import examine_language_model
from plainlora.doctor.settings import list_settings, read_settings
from plainlora.errors import UserError
from plainlora.hub.pushing import check_push
from plainlora.settings.programs import SFT, find_program
from plainlora.training.checkpoints import resume_path
from plainlora.training.run_folder import check_inputs_apart, claim_output_dir, is_run

STAGES = (
    *("reading the settings", "looking at the base", "reading rows", "looking at rows", "laying out the model"),
    "counting memory",
)


def examine(config: str, flags: Sequence[str], say: Callable[[str], None]) -> Diagnosis:
    """Examines a recipe as its program would, past every error.

    Args:
        config: The recipe's YAML.
        flags: More of its flags.
        say: Told which of the stages begins.

    Raises:
        UserError: The file is no YAML mapping, so that there is nothing to examine.
    """
    say("reading the settings")
    program = find_program(config, flags)
    found = Diagnosis(config, program.name)
    parts, origins = read_settings(program, config, flags, found.examination)
    _examine_folder(parts, found.examination)
    examine_parts = examine_language_model if program is SFT else examine_classifier
    decided = found.examination.ask("doctor", "went through", examine_parts, found, cast(Any, parts), say)
    found.settings = list_settings(parts, origins, decided or {})
    return found


def _examine_folder(parts: tuple[Any, ...], examination: Examination) -> None:
    """Whether the run may start there, with this schedule, from this checkpoint."""
    recipe, script, training, model = parts
    inputs = {
        "base model": model.model_name_or_path,
        "dataset": script.dataset_name,
        "test dataset": recipe.eval_dataset_name,
        "validation dataset": getattr(recipe, "validation_dataset_name", None),
    }
    if training.output_dir:  # else it has been said that it is empty
        examination.ask("settings", "output folder", check_inputs_apart, training.output_dir, inputs)
    passed_over: list[str] = []
    checkpoint = examination.ask("settings", "resuming", resume_path, training, passed_over.append)
    for said in passed_over:
        examination.add("note", "settings", "resuming", said)
    if training.output_dir:
        _examine_earlier_run(Path(training.output_dir), recipe.overwrite, checkpoint, examination)
    examination.ask(
        "settings", "publishing", check_push, training, str(model.model_name_or_path), recipe.hub_base_model
    )


def _examine_earlier_run(folder: Path, overwrite: bool, checkpoint: str | None, examination: Examination) -> None:
    """What lies in the run's folder. Of a recipe that has been run its own results do, which is no error."""
    try:
        claim_output_dir(folder, overwrite, resume=checkpoint)
    except UserError as error:
        if is_run(folder) and not overwrite:
            examination.add("warning", "settings", "output folder", f"a new run needs --overwrite: {error}")
        else:
            examination.add("error", "settings", "output folder", str(error))
