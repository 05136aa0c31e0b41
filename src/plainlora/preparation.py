"""A recipe's data flags -> rows ready for SFTTrainer."""

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig

from plainlora.arguments import RecipeArguments
from plainlora.data.datasets import load_train_and_test
from plainlora.data.encoding import encode_rows, find_schema
from plainlora.errors import UserError


@dataclass
class PreparedRows:
    """What a run trains and is tested on.

    Attributes:
        train: Training rows as `input_ids` and `labels`.
        test: Test rows likewise, if there are any.
        raw_test: The test rows as they were read, to be asked and answered.
    """

    train: Dataset
    test: Dataset | None
    raw_test: Dataset | None


def prepare_rows(
    recipe: RecipeArguments,
    script: ScriptArguments,
    training: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> PreparedRows:
    """Reads, checks, renders and tokenises the rows, and says what became of them.

    Args:
        recipe: How to split and what to do with long rows.
        script: Which data set.
        training: Longest row, and which tokens are trained.
        tokenizer: With the template installed.
        say: Told one line about each split.

    Raises:
        UserError: The rows cannot be had or used, or test rows are asked for and there are none.
    """
    train, test = load_train_and_test(
        str(script.dataset_name),
        config=script.dataset_config,
        train_split=script.dataset_train_split,
        test_split=script.dataset_test_split,
        test_name=recipe.eval_dataset_name,
        test_split_size=recipe.test_split_size,
        max_train_rows=recipe.max_train_rows,
        seed=training.seed,
    )
    if test is None and (recipe.exact_match_rows or training.eval_strategy != "no"):
        raise UserError("eval_strategy and exact_match_rows need test rows: set test_split_size or eval_dataset_name")
    answers_only = training.completion_only_loss
    if answers_only is None:  # TRL's meaning: on for rows of prompt and completion, off for others
        schema = find_schema(train, training.dataset_text_field, f"{script.dataset_name} (train)")
        answers_only = schema == "prompt"

    def encode(rows: Dataset, split: str) -> Dataset:
        encoded, counts = encode_rows(
            rows,
            tokenizer,
            where=f"{script.dataset_name} ({split})",
            text_column=training.dataset_text_field,
            answers_only=answers_only or training.assistant_only_loss,
            max_length=training.max_length,
            on_overflow=recipe.on_overflow,
            max_overflow=recipe.max_overflow,
            keep_end=training.truncation_mode == "keep_end",
            num_proc=training.dataset_num_proc,
        )
        say(counts.line(f"{split} rows", recipe.on_overflow))
        return encoded

    return PreparedRows(encode(train, "train"), None if test is None else encode(test, "test"), test)
