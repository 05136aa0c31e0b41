"""Rows -> token ids and labels, with a count of everything that was left out.

A label of -100 is not trained (PyTorch's `ignore_index`). Every row that is kept trains at least one EOS, so the model
learns to stop; labels come from the row's own length, so a pad token equal to EOS cannot swallow it (trl#1623).
"""

import json
import math
import re
import statistics
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from plainlora.data.datasets import check_text_columns
from plainlora.data.lengths import percentile_95
from plainlora.data.prompts import (
    BrokenTemplate,
    Message,
    apply_template,
    assistant_message,
    render,
    user_message,
    without_bos,
)
from plainlora.errors import UserError

IGNORED = -100
ROUNDING = 1e-6  # of a row: 0.29 * 100 is less than 29
Schema = Literal["messages", "prompt", "instruction", "text"]
Overflow = Literal["drop", "truncate"]


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows. Lengths are in tokens, before anything was cut.

    Attributes:
        where: The file or the Hub id, and the split.
        max_length: Longest row allowed; `None` for no limit.
        on_overflow: What happened to longer rows.
        max_truncated: Share of longer rows above which it is an error.
        eos_token: What the tokenizer ends answers with.
        rows: Rows read.
        kept: Rows trained on.
        too_long: Rows longer than `max_length`: dropped, or truncated.
        eos_cut_off: Rows that are trained without their last EOS, because truncation cut it off.
        empty_answers: Rows whose answer is empty or white space.
        answers_cut_off: Rows dropped because truncation left no trained token of theirs.
        untrained: Rows dropped because no token of theirs would be trained, truncated or not.
        without_eos: Rows whose answer the template does not end with EOS.
        first_without_eos: Number of the first of them, from 1.
        merged_boundaries: Rows whose last prompt token merges with the answer, so that inference sees other tokens.
        first_merged: Number of the first of them, from 1.
        longest: The longest row.
        median: A row in the middle.
        percentile_95: 95 % of the rows are no longer.
        tokens: Tokens in the kept rows.
        trained_tokens: Those of them that are trained.
        largest_id: The largest token id in the rows.
    """

    where: str
    max_length: int | None
    on_overflow: Overflow
    max_truncated: float
    eos_token: str
    rows: int
    kept: int
    too_long: int
    eos_cut_off: int
    empty_answers: int
    answers_cut_off: int
    untrained: int
    without_eos: int
    first_without_eos: int | None
    merged_boundaries: int
    first_merged: int | None
    longest: int
    median: float
    percentile_95: int
    tokens: int
    trained_tokens: int
    largest_id: int

    def line(self, what: str) -> str:
        """The report in one line."""
        parts = [
            f"{what}: {self.kept:,} of {self.rows:,} rows, {self.tokens:,} tokens ({self.trained_tokens:,} trained)",
            f"median {self.median:.0f}, 95 % up to {self.percentile_95}, longest {self.longest}",
        ]
        cut = "dropped" if self.on_overflow == "drop" else "truncated"
        for count, fate in (
            (self.too_long, f"longer than max_length {cut}"),
            (self.eos_cut_off, "of them trained without their EOS"),
            (self.answers_cut_off, "of them without their answer, dropped"),
            (self.untrained, "without a trained token dropped"),
            (self.merged_boundaries, "whose prompt and answer merge into one token"),
        ):
            if count:
                parts.append(f"{count:,} {fate}")
        return "; ".join(parts)

    def faults(self) -> dict[str, str]:
        """Why these rows must not be trained on, by the name of the check, each with what to do."""
        found = {}
        if self.without_eos:
            found["eos"] = (
                f"{self.where} row {self.first_without_eos}: the chat template does not end answers with the "
                f"tokenizer's EOS {self.eos_token!r}, so the model would never learn to stop; set eos_token to the "
                "token that ends them, or prompt_template to one that does"
            )
        if self.empty_answers == self.rows:
            found["empty"] = (
                f"{self.where}: no row has an answer, so the model would learn to say nothing; look at the rows"
            )
        if self.too_long > self.max_truncated * self.rows + ROUNDING:
            percent = -(-100 * self.too_long // self.rows)  # rounded up
            accept = f", or accept that they are lost with --max_truncated {percent / 100:.2f}" if self.kept else ""
            found["truncated"] = (
                f"{self.where}: {self.too_long} of {self.rows} rows are longer than max_length={self.max_length} "
                f"tokens (median {self.median:.0f}, longest {self.longest}); raise max_length{accept}"
            )
        elif not self.kept:
            found["left"] = (
                f"{self.where}: no row is left with a token to train on; raise max_length or look at the rows"
            )
        return found

    def check(self) -> None:
        """Raises `UserError` if these rows must not be trained on, with the first reason."""
        for fault in self.faults().values():
            raise UserError(fault)


def find_schema(rows: Dataset, text_column: str, where: str) -> Schema:
    """Which of the four layouts of a row this dataset has, checked for missing and non-text fields.

    Raises:
        UserError: None fits (the columns are listed), or a row lacks a field.
    """
    columns = rows.column_names
    if "messages" in columns:
        return "messages"
    if {"prompt", "completion"} <= set(columns):
        return "prompt"
    if {"instruction", "output"} <= set(columns):
        check_text_columns(rows, ["instruction", "output"], where)
        if "input" in columns:
            check_text_columns(rows, ["input"], where, optional=True)
        return "instruction"
    if text_column in columns:
        check_text_columns(rows, [text_column], where)
        return "text"
    for column in {"conversations", "conversation"} & set(columns):  # ShareGPT's
        raise UserError(
            f"{where}: {column!r} is another layout; write messages, each with a role (user, assistant) and a content"
        )
    if len(columns) == 1 and len(rows) == 1 and isinstance(rows[0][columns[0]], list):
        raise UserError(f"{where} is one object that holds a list, {columns[0]!r}; give a file that is that list")
    raise UserError(
        f"{where} has the columns {', '.join(columns)}; needed are instruction and output, prompt and completion, "
        f"messages, or {text_column!r} (set dataset_text_field for another name)"
    )


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def text_pair(row: dict[str, Any], schema: Schema) -> tuple[str, str] | None:
    """The prompt and the completion of a row that has both as plain text, which no template touches, as in TRL."""
    if schema == "prompt" and isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return row["prompt"], row["completion"]
    return None


def split_row(row: dict[str, Any], schema: Schema) -> tuple[list[Message], list[Message]]:
    """The row's prompt and its answer as chat messages; for a conversation everything is prompt up to the last turn.

    Rows of plain text have none: see `text_pair`.

    Raises:
        UserError: The row's messages are not a conversation that ends with the assistant.
    """
    if schema == "instruction":
        return [user_message(row["instruction"], row.get("input") or "")], [assistant_message(row["output"])]
    if schema == "prompt":
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, list) or not isinstance(completion, list):
            kinds = " and ".join(_kind(side) for side in (prompt, completion))
            raise UserError(f"'prompt' and 'completion' must be two texts or two lists of messages, not {kinds}")
        messages = [*prompt, *completion]
    else:
        messages = row["messages"]
        if not isinstance(messages, list):
            raise UserError(f"'messages' must be a list of messages, not {_kind(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"a message needs a role and a content, both text, not {message!r}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError("a conversation must end with a message of the assistant")
    return messages[:-1], messages[-1:]


def _has_answer(row: dict[str, Any], schema: Schema) -> bool:
    """Whether the answer is more than white space. A plain text has none of its own; an empty one trains nothing."""
    if schema == "text":
        return True
    texts = text_pair(row, schema)
    return bool((split_row(row, schema)[1][0]["content"] if texts is None else texts[1]).strip())


def prompts_of(rows: Dataset, schema: Schema, text_column: str) -> list[str]:
    """What each row asks, to compare rows by; the whole text, where nothing tells the question from the answer."""
    if schema == "text":
        return [text.strip() for text in rows[text_column]]
    if schema == "instruction":
        inputs = rows["input"] if "input" in rows.column_names else [""] * len(rows)
        pairs = zip(rows["instruction"], inputs, strict=True)
        return [user_message(instruction, context or "")["content"] for instruction, context in pairs]
    if schema == "prompt":
        return [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in rows["prompt"]]
    return [json.dumps(messages[:-1]) for messages in rows["messages"]]


def _common_prefix(left: list[int], right: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class Encoder:
    """Turns a row into `input_ids` and `labels`.

    Args:
        tokenizer: With the template installed and an EOS token.
        schema: The layout of the rows.
        text_column: The column of plain text, for the schema `text`.
        answers_only: Whether only the assistant's tokens are trained.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, schema: Schema, text_column: str, answers_only: bool
    ) -> None:
        if answers_only and schema == "text":
            raise UserError(
                "completion_only_loss needs rows that tell the answer from the prompt; "
                f"the column {text_column!r} holds both in one text"
            )
        self.tokenizer, self.schema, self.text_column, self.answers_only = tokenizer, schema, text_column, answers_only

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's `input_ids` and `labels`; whether its prompt's tokens begin them, and whether its EOS is trained.

        The last two are `prompt_is_prefix` and `trains_eos`.
        """
        if self.schema == "text":
            ids = self.tokenizer(without_bos(row[self.text_column], self.tokenizer), verbose=False).input_ids
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids = [*ids, self.tokenizer.eos_token_id]
            return {"input_ids": ids, "labels": list(ids), "prompt_is_prefix": True, "trains_eos": True}
        texts = text_pair(row, self.schema)
        if texts is not None:
            return self._encode_texts(*texts)
        prompt, answer = split_row(row, self.schema)
        ids = self._tokenize(render([*prompt, *answer], self.tokenizer))
        prompt_ids = self._tokenize(render(prompt, self.tokenizer, for_generation=True))
        shared = _common_prefix(prompt_ids, ids)
        labels = list(ids)
        if self.answers_only and self.schema == "messages":
            labels = self._mask_all_but_assistant([*prompt, *answer], ids)
        elif self.answers_only:
            labels = [IGNORED] * shared + ids[shared:]
        return {
            "input_ids": ids,
            "labels": labels,
            "prompt_is_prefix": shared == len(prompt_ids),
            "trains_eos": self.tokenizer.eos_token_id in labels[shared:],
        }

    def _encode_texts(self, prompt: str, completion: str) -> dict[str, Any]:
        """One text after the other, as they are, with the tokenizer's own special tokens.

        https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py (`add_eos`, `tokenize_fn`)
        """
        eos = str(self.tokenizer.eos_token)
        completion = completion if completion.endswith(eos) else completion + eos
        prompt = without_bos(prompt, self.tokenizer)
        ids = list(self.tokenizer(prompt + completion, verbose=False).input_ids)
        prompt_ids = list(self.tokenizer(prompt, verbose=False).input_ids)
        shared = _common_prefix(prompt_ids, ids)
        labels = [IGNORED] * shared + ids[shared:] if self.answers_only else list(ids)
        prefix = shared == len(prompt_ids)
        return {"input_ids": ids, "labels": labels, "prompt_is_prefix": prefix, "trains_eos": True}

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _mask_all_but_assistant(self, messages: list[Message], ids: list[int]) -> list[int]:
        mask: list[int] = []
        if re.search(r"{%-?\s*generation\s*-?%}", self.tokenizer.get_chat_template()):
            encoded = apply_template(
                messages, self.tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = encoded["assistant_masks"]
        if not any(mask):
            raise UserError("training on the assistant's turns only needs a template with {% generation %} markers")
        return [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]


def _trains(labels: list[int]) -> bool:
    """Whether a row trains anything. Its first label has no position before it to predict it from."""
    return any(label != IGNORED for label in labels[1:])


def _first(flags: list[bool]) -> int | None:
    """Number of the first that is set, from 1."""
    return flags.index(True) + 1 if True in flags else None


def encode_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str,
    text_column: str,
    answers_only: bool,
    max_length: int | None,
    on_overflow: Overflow,
    max_truncated: float,
    keep_end: bool = False,
    num_proc: int | None = None,
) -> tuple[Dataset, EncodingReport]:
    """Renders and tokenises every row, then drops or truncates what is too long.

    Whether the rows may be trained on is for `EncodingReport.faults` to say.

    Args:
        rows: As read.
        tokenizer: With the template installed.
        where: What to call the rows in messages: the file or the Hub id.
        text_column: The column of plain text, if the rows are plain text.
        answers_only: Whether only the assistant's tokens are trained.
        max_length: Longest row in tokens; `None` for no limit.
        on_overflow: What happens to longer rows.
        max_truncated: Share of longer rows above which it is a fault.
        keep_end: Whether truncation keeps the end of a row instead of its start.
        num_proc: Processes that tokenise.

    Returns:
        The rows with `input_ids` and `labels`, and the report.

    Raises:
        UserError: No usable columns, or a bad row.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so the model would never learn to stop; set eos_token")
    eos = tokenizer.eos_token_id
    encoder = Encoder(tokenizer, find_schema(rows, text_column, where), text_column, answers_only)

    def encode(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            encoded = encoder(row)
        except BrokenTemplate:  # which is no row's fault
            raise
        except UserError as error:
            raise UserError(f"{where} row {number + 1}: {error}") from error
        found = {"length": len(encoded["input_ids"]), "largest": max(encoded["input_ids"], default=0)}
        answered = _has_answer(row, encoder.schema)
        return encoded | found | {"trained": _trains(encoded["labels"]), "answered": answered}

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        ids, labels, long = row["input_ids"], row["labels"], row["length"] > (max_length or math.inf)
        kept = slice(-(max_length or 0), None) if keep_end else slice(None, max_length)
        if not long:
            return {"input_ids": ids, "labels": labels, "eos_cut_off": False}
        lost = eos in labels[max_length:] and not keep_end and _trains(labels[kept])
        return {"input_ids": ids[kept], "labels": labels[kept], "eos_cut_off": lost}

    # Not from the cache: its fingerprint does not see a change in this project's code.
    encoded = rows.map(
        encode,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc=f"Tokenizing {where}",
    )
    lengths, merged = encoded["length"][:], [not is_prefix for is_prefix in encoded["prompt_is_prefix"]]
    without_eos = [trains and not ends for trains, ends in zip(encoded["trained"], encoded["trains_eos"], strict=True)]
    largest = max(encoded["largest"])
    too_long = sum(max_length is not None and length > max_length for length in lengths)
    left = encoded
    if too_long and on_overflow == "drop":
        left = encoded.filter(
            lambda length: length <= max_length, input_columns="length", keep_in_memory=True, desc="Dropping long rows"
        )
    elif too_long:
        left = encoded.map(cut, keep_in_memory=True, load_from_cache_file=False, desc="Truncating long rows")
    trainable = left.filter(
        _trains, input_columns="labels", keep_in_memory=True, desc="Looking for rows without a trained token"
    )
    untrained = len(left) - sum(left["trained"])
    report = EncodingReport(
        where=where,
        max_length=max_length,
        on_overflow=on_overflow,
        max_truncated=max_truncated,
        eos_token=str(tokenizer.eos_token),
        rows=len(rows),
        kept=len(trainable),
        too_long=too_long,
        eos_cut_off=sum(left["eos_cut_off"]) if "eos_cut_off" in left.column_names else 0,
        empty_answers=len(rows) - sum(encoded["answered"]),
        answers_cut_off=len(left) - untrained - len(trainable),
        untrained=untrained,
        without_eos=sum(without_eos),
        first_without_eos=_first(without_eos),
        merged_boundaries=sum(merged),
        first_merged=_first(merged),
        longest=max(lengths),
        median=statistics.median(lengths),
        percentile_95=percentile_95(lengths),
        tokens=sum(len(ids) for ids in trainable["input_ids"]),
        trained_tokens=sum(label != IGNORED for labels in trainable["labels"] for label in labels),
        largest_id=largest,
    )
    return trainable.select_columns(["input_ids", "labels"]), report
