"""What base, adapter and merged model are asked, as token ids: a few prompts, and some text to be surprised by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from plainlora.data.classification import load_labelled, tokenize_texts
from plainlora.data.datasets import load_train_and_test
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
NEW_TOKENS = 16  # of every answer, at most
ROWS = 64  # of test rows, at most
LONGEST = 256  # tokens of a row
MOST = 1024  # tokens of all test rows: a large model on a processor reads a few of them a second
MOST_GIVEN = 4096  # tokens of a text that was asked for


@dataclass(frozen=True)
class Probes:
    """What is asked of every model.

    Attributes:
        questions: For `plainlora.merging.reload.ask`.
        source: Where the text comes from, in a few words.
        rows: Rows of the text.
        tokens: Tokens of it whose loss is taken; for a classifier, its tokens.
        prompts: Rendered, for a language model to answer; see `with_answers`.
    """

    questions: dict[str, Any]
    source: str
    rows: int
    tokens: int
    prompts: tuple[str, ...] = ()

    def with_answers(self, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> "Probes":
        """The same with one model's answers to the prompts, along which all models are compared token by token.

        A model whose likeliest token is the same everywhere gives the same greedy answer.
        """
        followed = answered(tokenizer, self.prompts, answers)["probes"]
        return replace(self, questions=self.questions | {"probes": followed})


def read_text(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        UserError: There is no such file, it is no text, or all its lines are blank.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read as text ({error}); give a UTF-8 file") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"--text {path} holds no text; give a file with some, or leave it out")
    return lines


def language_probes(
    tokenizer: PreTrainedTokenizerBase, context: int | None, text: str | Path | None, run: dict[str, Any]
) -> Probes:
    """What a causal language model is asked.

    Args:
        tokenizer: The adapter's, with training's template.
        context: Longest sequence of the model, in tokens.
        text: A text file whose perplexity is taken; if left out, the run's test rows are, if they can be had again,
            and else a built-in passage.
        run: The `run.json` of the adapter's training, or nothing.

    Raises:
        UserError: The text cannot be read.
    """
    longest = min(LONGEST, context or LONGEST)
    rows: Iterable[dict[str, list[int]]]
    if text is not None:
        source, most = f"the text {text}", MOST_GIVEN
        rows = _windows("\n".join(read_text(text)), tokenizer, longest)
    else:
        source, rows = _test_rows(run, tokenizer) or ("a built-in passage", _plain(PASSAGE, tokenizer))
        most = MOST
    chosen = _first(rows, longest, most)
    prompts = tuple(render_prompt(prompt, tokenizer) for prompt in PROMPTS)
    questions = {"probes": [], "texts": chosen}
    return Probes(questions, source, len(chosen), sum(_trained(row) for row in chosen), prompts)


def classifier_probes(
    tokenizer: PreTrainedTokenizerBase, context: int | None, text: str | Path | None, run: dict[str, Any]
) -> Probes:
    """What a classifier is asked: every text is a probe. Arguments and errors are those of `language_probes`."""
    if text is not None:
        source, texts = f"the lines of {text}", read_text(text)
    else:
        source, texts = _test_texts(run) or ("built-in sentences", [*PROMPTS, *PASSAGE])
    longest = min(LONGEST, context or LONGEST, (run.get("arguments") or {}).get("max_length") or LONGEST)
    probes, _ = tokenize_texts(texts[:ROWS], tokenizer, longest)
    questions = {"probes": [{"input_ids": ids} for ids in probes], "texts": []}
    return Probes(questions, source, len(probes), sum(map(len, probes)))


def answered(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Questions for `ask` of `reload.py`: rendered prompts and their answers, both as probes and as texts."""
    probes, texts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = _ids(prompt, tokenizer)
        end = _ids(answer + str(tokenizer.eos_token or ""), tokenizer)
        probes.append({"input_ids": ids + _ids(answer, tokenizer), "start": len(ids)})
        texts.append({"input_ids": ids + end, "labels": [IGNORED] * len(ids) + end})
    return {"probes": probes, "texts": texts}


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[dict[str, list[int]]]:
    """One text, cut every `longest` tokens."""
    ids = list(tokenizer(text, verbose=False).input_ids)
    pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def _plain(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    return [row for text in texts for row in _windows(text, tokenizer, LONGEST)]


def _first(rows: Iterable[dict[str, list[int]]], longest: int, most: int) -> list[dict[str, list[int]]]:
    """Rows until `most` tokens are reached, each cut; those without a token to predict are left out."""
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


def _spread(rows: Dataset) -> Dataset:
    """Rows from all over a data set, which may be sorted by class."""
    return rows.select(range(0, len(rows), max(1, len(rows) // ROWS))[:ROWS])


def _test_rows(
    run: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, Iterable[dict[str, list[int]]]] | None:
    """The run's own test rows, read again as its arguments say; `None` if they cannot be had."""
    try:
        told = run["arguments"]
        name = str(told["dataset_name"])
        _, test = load_train_and_test(
            name,
            config=told["dataset_config"],
            train_split=told["dataset_train_split"],
            test_split=told["dataset_test_split"],
            test_name=told["eval_dataset_name"],
            test_split_size=told["test_split_size"],
            max_train_rows=None,
            seed=told["seed"],
        )
        if test is None:
            return None
        schema = find_schema(test, told["dataset_text_field"], name)
        answers_only = trains_answers_only(schema, told["completion_only_loss"])
        encode = Encoder(
            tokenizer, schema, told["dataset_text_field"], answers_only, bool(bool(told.get("assistant_only_loss")))
        )
        return f"test rows of {told['eval_dataset_name'] or name}", [encode(row) for row in _spread(test)]
    except (UserError, KeyError, TypeError):
        return None


def _test_texts(run: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The test texts of a classifier's run, likewise."""
    try:
        told = run["arguments"]
        name = str(told["dataset_name"])
        read = load_labelled(
            name,
            config=told["dataset_config"],
            train_split=told["dataset_train_split"],
            validation_split=told["dataset_validation_split"],
            test_split=told["dataset_test_split"],
            validation_name=told["validation_dataset_name"],
            test_name=told["eval_dataset_name"],
            validation_size=told["validation_split_size"],
            test_size=told["test_split_size"],
            columns=told["dataset_columns"],
            text_column=told["text_column"],
            label_column=told["label_column"],
            labels=told["labels"],
            balance=told["balance_classes"],
            on_empty=told["on_empty"],
            max_train_rows=told["max_train_rows"],
            max_eval_rows=told["max_eval_rows"],
            seed=told["seed"] if told["data_seed"] is None else told["data_seed"],
        )
    except (UserError, KeyError, TypeError):
        return None
    if read.test is None:
        return None
    return f"test rows of {told['eval_dataset_name'] or name}", list(_spread(read.test)["text"])
