"""Reads and encodes the rows that a recipe's settings name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from plainlora.data.beginnings import Beginnings, compare_beginnings
from plainlora.data.classification import LabelledSplits, TextReport, encode_texts, load_labelled
from plainlora.data.datasets import evenly_spaced, load_train_and_test
from plainlora.data.encoding import EncodingReport, encode_rows, trains_answers_only
from plainlora.data.layouts import find_schema, is_rendered, prompts_of, unread_columns
from plainlora.settings.programs import ClassifySettings, SFTSettings


@dataclass
class PreparedRows:
    """The training and test rows of a run.

    Attributes:
        train: Training rows as `input_ids` and `labels`.
        test: Test rows as `input_ids` and `labels`, if there are any.
        raw_test: The test rows as read, for questions and answers.
        reports: The counts of each split's encoding.
        answers_only: Whether `completion_only_loss` holds.
        rendered: Whether the rows are rendered by the chat template.
        beginnings: How rows of plain text begin; `None` for rendered ones.
        unread: Columns that are not used.
        repeated: Number of training rows whose prompt is in an earlier row.
        leaked: Number of test rows whose prompt is in a training row.
        missing: An error in one line, if settings need test rows and there are none.
        too_few: An error in one line, if there are too few rows for one step.
    """

    train: Dataset
    test: Dataset | None
    raw_test: Dataset | None
    reports: dict[str, EncodingReport]
    answers_only: bool
    rendered: bool
    beginnings: Beginnings | None
    unread: list[str]
    repeated: int
    leaked: int
    missing: str | None
    too_few: str | None

    @property
    def by_split(self) -> dict[str, Dataset | None]:
        """The rows of every split."""
        return {"train": self.train, "test": self.test}


def read_rows(settings: SFTSettings) -> tuple[Dataset, Dataset | None]:
    """Reads training rows, and test rows if there are any.

    Raises:
        UserError: They cannot be read, or have no supported layout.
    """
    recipe, script, training, _ = settings.parts
    return load_train_and_test(
        str(script.dataset_name),
        check=lambda rows, where: find_schema(rows, training.dataset_text_field, where),
        config=script.dataset_config,
        train_split=script.dataset_train_split,
        test_split=script.dataset_test_split,
        test_name=recipe.eval_dataset_name,
        test_split_size=recipe.test_split_size,
        max_train_rows=recipe.max_train_rows,
        seed=training.seed,
    )


def prepare_rows(
    settings: SFTSettings, tokenizer: PreTrainedTokenizerBase, log: Callable[[str], None]
) -> PreparedRows:
    """Reads, renders and tokenises the rows. Whether they should be trained on is checked by `plainlora.doctor`.

    Args:
        settings: The data set, its splits, which tokens are trained, and how long rows are handled.
        tokenizer: A tokenizer with the chat template installed.
        log: Called with one line for each split.

    Raises:
        UserError: The rows cannot be read, or a row cannot be used.
    """
    recipe, script, training, _ = settings.parts
    train, test = read_rows(settings)
    missing = None
    if test is None and (recipe.exact_match_rows or training.eval_strategy != "no"):
        early = recipe.early_stopping_patience is not None
        what = "early_stopping_patience needs" if early else "eval_strategy and exact_match_rows need"
        missing = f"{what} test rows: set test_split_size or eval_dataset_name"
    column, reports = training.dataset_text_field, {}
    names = {
        "train": f"{script.dataset_name} (train)",
        "test": f"{recipe.eval_dataset_name or script.dataset_name} (test)",
    }
    schema = find_schema(train, column, names["train"])
    answers_only = trains_answers_only(schema, training.completion_only_loss)

    def encode(rows: Dataset, split: str) -> Dataset:
        encoded, reports[split] = encode_rows(
            rows,
            tokenizer,
            where=names[split],
            text_column=column,
            answers_only=answers_only,
            max_length=training.max_length,
            on_overflow=recipe.on_overflow,
            max_truncated=recipe.max_truncated,
            keep_end=training.truncation_mode == "keep_end",
            num_proc=training.dataset_num_proc,
            assistant_only=training.assistant_only_loss,
        )
        log(reports[split].line(f"{split} rows"))
        return encoded

    encoded = encode(train, "train"), None if test is None else encode(test, "test")
    unread = unread_columns(train, schema, column)
    if unread:
        log(f"train rows: nothing reads the column{'s' * (len(unread) > 1)} {', '.join(unread)}")
    rendered = is_rendered(train[0], schema)
    asked = prompts_of(train, schema, column)
    trained = set(asked)
    tested = []
    if test is not None:
        tested = prompts_of(test, find_schema(test, column, names["test"]), column)
    return PreparedRows(
        *encoded,
        raw_test=test,
        reports=reports,
        answers_only=answers_only,
        rendered=rendered,
        beginnings=None if rendered else compare_beginnings(train[column] if schema == "text" else asked, tokenizer),
        unread=unread,
        repeated=len(asked) - len(trained),
        leaked=sum(prompt in trained for prompt in tested),
        missing=missing,
        too_few=_too_few(training, len(encoded[0]), reports["train"].tokens),
    )


def _too_few(training: SFTConfig, rows: int, tokens: int) -> str | None:
    batch, what = training.per_device_train_batch_size * training.world_size, "rows"
    if training.packing and training.max_length and rows >= batch:
        # Best fit leaves no two sequences that would fit into one, so all but one are half full on average.
        rows, what = 2 * tokens // training.max_length + 1, "packed sequences at most"
    if not training.dataloader_drop_last or rows >= batch:
        return None
    return (
        f"{rows:,} {what} make no whole batch of {batch:,}, and dataloader_drop_last drops an incomplete one, so no "
        "step would be taken; leave it out, or lower per_device_train_batch_size"
    )


@dataclass
class PreparedTexts:
    """The rows of a classifier's run, as `input_ids` and `labels`.

    Attributes:
        train: Training rows.
        validation: Rows to choose settings by, if there are any.
        test: Rows to report on, if there are any.
        labels: Name of each class, by number.
        read: The rows as read and split.
        reports: The counts of each split's tokenisation.
        missing: An error in one line, if settings need validation rows and there are none.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    labels: list[str]
    read: LabelledSplits
    reports: dict[str, TextReport]
    missing: str | None

    @property
    def by_split(self) -> dict[str, Dataset | None]:
        """The rows of every split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def splits(self, measured_train_rows: int) -> dict[str, Dataset]:
        """The rows on which accuracy is measured; of the training rows so many, evenly spaced."""
        train = evenly_spaced(self.train, measured_train_rows)
        found = {"training": train, "validation": self.validation, "test": self.test}
        return {name: rows for name, rows in found.items() if rows is not None}


def read_texts(settings: ClassifySettings) -> LabelledSplits:
    """Reads, checks and splits labelled texts.

    Raises:
        UserError: They cannot be read, or one cannot be used.
    """
    recipe, script, training, _ = settings.parts
    return load_labelled(
        str(script.dataset_name),
        config=script.dataset_config,
        train_split=script.dataset_train_split,
        validation_split=recipe.dataset_validation_split,
        test_split=script.dataset_test_split,
        validation_name=recipe.validation_dataset_name,
        test_name=recipe.eval_dataset_name,
        validation_size=recipe.validation_split_size,
        test_size=recipe.test_split_size,
        columns=recipe.dataset_columns,
        text_column=recipe.text_column,
        label_column=recipe.label_column,
        labels=recipe.labels,
        balance=recipe.balance_classes,
        on_empty=recipe.on_empty,
        max_train_rows=recipe.max_train_rows,
        max_eval_rows=recipe.max_eval_rows,
        seed=training.seed if training.data_seed is None else training.data_seed,
    )


def prepare_texts(
    settings: ClassifySettings,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    log: Callable[[str], None],
) -> PreparedTexts:
    """Reads, splits and tokenises labelled texts. Whether they should be trained on is checked by `plainlora.doctor`.

    Args:
        settings: Columns, classes and splits.
        tokenizer: The base's tokenizer.
        max_length: Length in tokens to which texts are cut; `None` for no limit.
        log: Called with one line for each split.

    Raises:
        UserError: The rows cannot be read, or a row cannot be used.
    """
    read = read_texts(settings)
    missing = None
    if read.validation is None and settings.training.eval_strategy != "no":
        name = "eval_strategy" if settings.recipe.early_stopping_patience is None else "early_stopping_patience"
        missing = f"{name} needs validation rows: set validation_split_size or validation_dataset_name"
    reports = {}
    log(read.line())

    def encode(rows: Dataset | None, split: str) -> Dataset | None:
        if rows is None:
            return None
        encoded, reports[split] = encode_texts(rows, tokenizer, max_length)
        log(reports[split].line(f"{split} rows"))
        return encoded

    train = cast(Dataset, encode(read.train, "train"))
    validation, test = encode(read.validation, "validation"), encode(read.test, "test")
    return PreparedTexts(train, validation, test, read.labels, read, reports, missing)
