"""Rows -> token ids and labels, with a count of everything that was left out.

A label of -100 is not trained (PyTorch's `ignore_index`). Every row that is kept trains at least one EOS, so the model
learns to stop; labels come from the row's own length, so a pad token equal to EOS cannot swallow it (trl#1623).
"""

import re
import statistics
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from plainlora.data.datasets import check_text_columns
from plainlora.data.prompts import Message, assistant_message, render, user_message, without_bos
from plainlora.errors import UserError

IGNORED = -100
Schema = Literal["messages", "prompt", "instruction", "text"]


@dataclass
class EncodingReport:
    """What became of the rows.

    Attributes:
        rows: Rows read.
        kept: Rows trained on.
        too_long: Rows longer than max_length: dropped, or truncated and without their EOS.
        untrained: Rows dropped because no token of theirs would be trained.
        merged_boundaries: Rows whose last prompt token merges with the answer, so that inference sees other tokens.
        longest: Tokens of the longest row, before anything was cut.
        median: Median tokens of a row, likewise.
        tokens: Tokens in the kept rows.
        trained_tokens: Those of them that are trained.
    """

    rows: int
    kept: int
    too_long: int
    untrained: int
    merged_boundaries: int
    longest: int
    median: float
    tokens: int
    trained_tokens: int

    def line(self, what: str, overflow: str) -> str:
        """The report in one line."""
        cut = {"drop": "dropped", "truncate": "truncated, so without EOS"}[overflow]
        parts = [
            f"{what}: {self.kept:,} of {self.rows:,} rows, {self.tokens:,} tokens ({self.trained_tokens:,} trained)",
            f"median {self.median:.0f}, longest {self.longest}",
        ]
        if self.too_long:
            parts.append(f"{self.too_long:,} longer than max_length {cut}")
        if self.untrained:
            parts.append(f"{self.untrained:,} without a trained token dropped")
        if self.merged_boundaries:
            parts.append(f"{self.merged_boundaries:,} whose prompt and answer merge into one token")
        return "; ".join(parts)


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
        """The row's `input_ids`, `labels`, and whether its prompt's tokens begin them (`prompt_is_prefix`)."""
        if self.schema == "text":
            ids = self.tokenizer(without_bos(row[self.text_column], self.tokenizer), verbose=False).input_ids
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids = [*ids, self.tokenizer.eos_token_id]
            return {"input_ids": ids, "labels": list(ids), "prompt_is_prefix": True}
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
        if self.tokenizer.eos_token_id not in labels[shared:]:
            raise UserError(
                f"the chat template does not end answers with the tokenizer's EOS {self.tokenizer.eos_token!r}, "
                "so the model would never learn to stop; set eos_token to the token that ends them, or "
                "prompt_template to one that does"
            )
        return {"input_ids": ids, "labels": labels, "prompt_is_prefix": shared == len(prompt_ids)}

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
        return {"input_ids": ids, "labels": labels, "prompt_is_prefix": shared == len(prompt_ids)}

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _mask_all_but_assistant(self, messages: list[Message], ids: list[int]) -> list[int]:
        mask: list[int] = []
        if re.search(r"{%-?\s*generation\s*-?%}", self.tokenizer.get_chat_template()):
            encoded: Any = self.tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = encoded["assistant_masks"]
        if not any(mask):
            raise UserError("training on the assistant's turns only needs a template with {% generation %} markers")
        return [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]


def encode_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str,
    text_column: str,
    answers_only: bool,
    max_length: int | None,
    on_overflow: Literal["drop", "truncate"],
    max_overflow: float,
    keep_end: bool = False,
    num_proc: int | None = None,
) -> tuple[Dataset, EncodingReport]:
    """Renders and tokenises every row, then drops or truncates what is too long.

    Args:
        rows: As read.
        tokenizer: With the template installed.
        where: What to call the rows in messages: the file or the Hub id.
        text_column: The column of plain text, if the rows are plain text.
        answers_only: Whether only the assistant's tokens are trained.
        max_length: Longest row in tokens; `None` for no limit.
        on_overflow: What happens to longer rows.
        max_overflow: Share of longer rows above which it is an error.
        keep_end: Whether truncation keeps the end of a row instead of its start.
        num_proc: Processes that tokenise.

    Returns:
        The rows with `input_ids` and `labels`, and the report.

    Raises:
        UserError: No usable columns, a bad row, too many long rows, or nothing left to train on.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so the model would never learn to stop; set eos_token")
    encoder = Encoder(tokenizer, find_schema(rows, text_column, where), text_column, answers_only)

    def encode(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            return encoder(row)
        except UserError as error:
            raise UserError(f"{where} row {number + 1}: {error}") from error

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
    lengths = [len(ids) for ids in encoded["input_ids"]]
    too_long = sum(max_length is not None and length > max_length for length in lengths)
    if too_long > max_overflow * len(lengths):
        raise UserError(
            f"{where}: {too_long} of {len(lengths)} rows are longer than max_length={max_length} tokens (median "
            f"{statistics.median(lengths):.0f}, longest {max(lengths)}); raise max_length, or accept that they are "
            f"lost with --max_overflow {too_long / len(lengths) + 0.005:.2f}"
        )
    if max_length is not None and too_long and on_overflow == "drop":
        encoded = encoded.filter(
            lambda row: len(row["input_ids"]) <= max_length, keep_in_memory=True, desc="Dropping long rows"
        )
    elif max_length is not None and too_long:
        kept = slice(-max_length, None) if keep_end else slice(None, max_length)
        encoded = encoded.map(
            lambda row: {"input_ids": row["input_ids"][kept], "labels": row["labels"][kept]},
            keep_in_memory=True,
            desc="Truncating long rows",
        )
    # The first label has no position before it to predict it from.
    trainable = encoded.filter(
        lambda row: any(label != IGNORED for label in row["labels"][1:]),
        keep_in_memory=True,
        desc="Looking for rows without a trained token",
    )
    if len(trainable) == 0:
        raise UserError(f"{where}: no row is left with a token to train on; raise max_length or look at the rows")
    report = EncodingReport(
        rows=len(rows),
        kept=len(trainable),
        too_long=too_long,
        untrained=len(encoded) - len(trainable),
        merged_boundaries=sum(not is_prefix for is_prefix in encoded["prompt_is_prefix"]),
        longest=max(lengths),
        median=statistics.median(lengths),
        tokens=sum(len(ids) for ids in trainable["input_ids"]),
        trained_tokens=sum(label != IGNORED for labels in trainable["labels"] for label in labels),
    )
    return trainable.select_columns(["input_ids", "labels"]), report
