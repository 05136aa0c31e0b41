"""`--push_to_hub` of the programs: checked before training, and pushed at its end as `plainlora push` does."""

from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from plainlora.errors import UserError
from plainlora.hub.publication import Publication, collect_publication, hub_base
from plainlora.hub.repository import Log, Repository, check_repository_name, open_repository
from plainlora.lora.errors import LoRAError, some

MESSAGE = "Upload with PlainLoRA"


def _name(training: TrainingArguments) -> str:
    """`hub_model_id`, or the output folder's name, as in Trainer."""
    return training.hub_model_id or Path(str(training.output_dir)).absolute().name


def check_push(training: TrainingArguments, base: str, hub_base_model: str | None) -> None:
    """Checks the settings of a push, without a connection.

    Args:
        training: The arguments, with `push_to_hub`.
        base: The base's name in the recipe.
        hub_base_model: The base's Hub id, if it is a local folder.

    Raises:
        UserError: A setting is wrong.
    """
    if not training.push_to_hub:
        return
    check_repository_name(_name(training))
    if HubStrategy(training.hub_strategy) is not HubStrategy.END:
        raise UserError(
            f"hub_strategy {HubStrategy(training.hub_strategy).value}: checkpoints hold the optimizer's state and "
            "pickles, which are not published; use end"
        )
    if training.hub_always_push:
        raise UserError("hub_always_push: there is one push, at the end; leave it out")
    hub_base("model_name_or_path", base, hub_base_model, "--hub_base_model")


def open_run_repository(training: TrainingArguments, log: Log) -> Repository | None:
    """Opens the repository before training, in the main process.

    Returns:
        The repository; `None` without `push_to_hub`, and in other processes.

    Raises:
        UserError: As `open_repository`.
    """
    if not training.push_to_hub or not PartialState().is_main_process:
        return None
    private = bool(training.hub_private_repo)
    return open_repository(_name(training), training.hub_token, private, training.hub_revision, log)


def push(publication: Publication, repository: Repository, message: str = MESSAGE) -> str:
    """Publishes a folder in one commit.

    Returns:
        A message for the user.

    Raises:
        UserError: As `Repository.commit`.
    """
    files = publication.at(repository.name)
    commit = repository.commit(files, message)
    message = f"pushed {len(files)} files to {repository.name}: {commit.url}"
    if not commit.changed:
        message = f"{repository.name} holds these {len(files)} files already: {commit.url}"
    others = sorted(set(repository.files) - set(files))
    return f"{message}; left as they were: {some(others)}" if others else message


def push_run(folder: str | Path, repository: Repository, base_model: str | None) -> str:
    """Pushes a run's folder at its end.

    Raises:
        UserError: As `collect_publication` and `push`; the message adds how to push later.
    """
    try:
        return push(collect_publication(folder, base_model), repository)
    except (UserError, LoRAError) as error:
        command = f"plainlora push --adapter {folder} --repo {repository.name}"
        command += f" --base_model {base_model}" if base_model else ""
        command += f" --revision {repository.revision}" if repository.revision else ""
        raise UserError(f"the run is saved in {folder}, but not pushed: {error}; continue with: {command}") from error
