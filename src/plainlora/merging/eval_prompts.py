"""The prompts and texts on which base, adapter and merged model are compared, as token ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from plainlora.data.classification import load_labelled, tokenize_texts
from plainlora.data.datasets import evenly_spaced, load_train_and_test
from plainlora.data.encoding import IGNORED, Encoder, trains_answers_only
from plainlora.data.layouts import find_schema
from plainlora.data.prompts import render_prompt
from plainlora.errors import UserError

PROMPTS = (
    "Name three primary colours.",
    "Why should someone be writing blogs about their field?",
    "Write one sentence about the sea.",
    "2 + 2 =",
)
PASSAGE = (
    "A bridge carries people over a river. Before it is opened, somebody walks along every beam, taps it and listens. "
    "Nobody expects a beam to be hollow; that is what the tapping is for.",
    "Bread needs flour, water, salt and time. The dough rises overnight in a cool room, and in the morning it is "
    "folded once more and baked until the crust sounds hollow.",
)
NEW_TOKENS = 16  # at most, of every answer
ROWS = 64  # at most, of the test rows
LONGEST = 256  # tokens of a row
MOST = 1024  # tokens of all test rows; a large model on a CPU processes a few tokens a second
MOST_GIVEN = 4096  # tokens of a text given by the user


@dataclass(frozen=True)
class EvalPrompts:
    """The inputs of every model.

    Attributes:
        questions: The inputs of `plainlora.merging.reload.ask`.
        source: The source of the text, for a message.
        rows: Number of rows of the text.
        tokens: Number of tokens whose loss is measured; for a classifier, of all tokens.
        prompts: Rendered prompts for a language model to answer; see `with_answers`.
    """

    questions: dict[str, Any]
    source: str
    rows: int
    tokens: int
    prompts: tuple[str, ...] = ()

    def asked_in(self, float32: bool) -> "EvalPrompts":
        """The same inputs, of which weights of 16 bits are computed with in float32, or as they are."""
        return replace(self, questions=self.questions | {"float32": float32})

    def with_answers(self, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> "EvalPrompts":
        """Adds one model's answers to the prompts, along which all models are compared token by token.

        A model with the same likeliest token at every position gives the same greedy answer.
        """
        prompts = answered(tokenizer, self.prompts, answers)["prompts"]
        return replace(self, questions=self.questions | {"prompts": prompts})


def read_text(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        UserError: The file is missing or not text, or all its lines are blank.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read as text ({error}); give a UTF-8 file") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"--text {path} holds no text; give a file with some, or leave it out")
    return lines


def language_prompts(
    tokenizer: PreTrainedTokenizerBase, context: int | None, text: str | Path | None, run: dict[str, Any]
) -> EvalPrompts:
    """The prompts and texts for a causal language model.

    Args:
        tokenizer: The adapter's tokenizer, with its chat template.
        context: The model's context length, in tokens.
        text: A text file on which to measure perplexity; if left out, the run's test rows are used if they can be read
            again, else a built-in passage.
        run: The adapter's `run.json`; empty if there is none.

    Raises:
        UserError: The text cannot be read.
    """
    longest = min(LONGEST, context or LONGEST)
    rows: Iterable[dict[str, list[int]]]
    if text is not None:
        source, most = f"the text {Path(text).name}", MOST_GIVEN
        rows = _windows("\n".join(read_text(text)), tokenizer, longest)
    else:
        source, rows = _test_rows(run, tokenizer) or ("a built-in passage", _plain(PASSAGE, tokenizer))
        most = MOST
    chosen = _first(rows, longest, most)
    prompts = tuple(render_prompt(prompt, tokenizer) for prompt in PROMPTS)
    questions = {"prompts": [], "texts": chosen}
    return EvalPrompts(questions, source, len(chosen), sum(_trained(row) for row in chosen), prompts)


def classifier_prompts(
    tokenizer: PreTrainedTokenizerBase, context: int | None, text: str | Path | None, run: dict[str, Any]
) -> EvalPrompts:
    """The texts for a classifier. Arguments and errors are those of `language_prompts`."""
    if text is not None:
        source, texts = f"the lines of {text}", read_text(text)
    else:
        source, texts = _test_texts(run) or ("built-in sentences", [*PROMPTS, *PASSAGE])
    longest = min(LONGEST, context or LONGEST, (run.get("arguments") or {}).get("max_length") or LONGEST)
    rows, _ = tokenize_texts(texts[:ROWS], tokenizer, longest)
    questions = {"prompts": [{"input_ids": ids} for ids in rows], "texts": []}
    return EvalPrompts(questions, source, len(rows), sum(map(len, rows)))


def answered(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Inputs of `reload.ask` from rendered prompts and their answers: each both as a prompt and as a text."""
    rows, texts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = _ids(prompt, tokenizer)
        end = _ids(answer + str(tokenizer.eos_token or ""), tokenizer)
        rows.append({"input_ids": ids + _ids(answer, tokenizer), "start": len(ids)})
        texts.append({"input_ids": ids + end, "labels": [IGNORED] * len(ids) + end})
    return {"prompts": rows, "texts": texts}


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[dict[str, list[int]]]:
    """A text cut into pieces of `longest` tokens."""
    ids = list(tokenizer(text, verbose=False).input_ids)
    pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def _plain(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    return [row for text in texts for row in _windows(text, tokenizer, LONGEST)]


def _first(rows: Iterable[dict[str, list[int]]], longest: int, most: int) -> list[dict[str, list[int]]]:
    """The first rows up to `most` tokens, each cut to `longest`; rows without a token to predict are left out."""
    chosen: list[dict[str, list[int]]] = []
    for row in rows:
        cut = {key: list(row[key][:longest]) for key in ("input_ids", "labels")}
        if sum(len(kept["input_ids"]) for kept in chosen) + len(cut["input_ids"]) > most and chosen:
            break
        if _trained(cut):
            chosen.append(cut)
    return chosen


def _trained(row: dict[str, list[int]]) -> int:
    return sum(label != IGNORED for label in row["labels"][1:])


def _test_rows(
    run: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, Iterable[dict[str, list[int]]]] | None:
    """The run's own test rows, read again by its recorded arguments; `None` if they cannot be read."""
    try:
        arguments = run["arguments"]
        name = str(arguments["dataset_name"])
        _, test = load_train_and_test(
            name,
            config=arguments["dataset_config"],
            train_split=arguments["dataset_train_split"],
            test_split=arguments["dataset_test_split"],
            test_name=arguments["eval_dataset_name"],
            test_split_size=arguments["test_split_size"],
            max_train_rows=None,
            seed=arguments["seed"],
        )
        if test is None:
            return None
        schema = find_schema(test, arguments["dataset_text_field"], name)
        answers_only = trains_answers_only(schema, arguments["completion_only_loss"])
        assistant_only = bool(arguments.get("assistant_only_loss"))
        encode = Encoder(tokenizer, schema, arguments["dataset_text_field"], answers_only, assistant_only)
        return f"test rows of {arguments['eval_dataset_name'] or name}", [
            encode(row) for row in evenly_spaced(test, ROWS)
        ]
    except (UserError, KeyError, TypeError):
        return None


def _test_texts(run: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The test texts of a classifier's run, read again by its recorded arguments; `None` if they cannot be read."""
    try:
        arguments = run["arguments"]
        name = str(arguments["dataset_name"])
        read = load_labelled(
            name,
            config=arguments["dataset_config"],
            train_split=arguments["dataset_train_split"],
            validation_split=arguments["dataset_validation_split"],
            test_split=arguments["dataset_test_split"],
            validation_name=arguments["validation_dataset_name"],
            test_name=arguments["eval_dataset_name"],
            validation_size=arguments["validation_split_size"],
            test_size=arguments["test_split_size"],
            columns=arguments["dataset_columns"],
            text_column=arguments["text_column"],
            label_column=arguments["label_column"],
            labels=arguments["labels"],
            balance=arguments["balance_classes"],
            on_empty=arguments["on_empty"],
            max_train_rows=arguments["max_train_rows"],
            max_eval_rows=arguments["max_eval_rows"],
            seed=arguments["seed"] if arguments["data_seed"] is None else arguments["data_seed"],
        )
    except (UserError, KeyError, TypeError):
        return None
    if read.test is None:
        return None
    return f"test rows of {arguments['eval_dataset_name'] or name}", list(evenly_spaced(read.test, ROWS)["text"])
