"""Rows -> token ids and labels, with a count of everything that is left out.

A label of -100 is not trained (PyTorch's `ignore_index`). Labels come from the length of a row, not from padding,
so EOS is trained even if it is the pad token (trl#1623).
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from plainlora.data.coverage import Coverage, Omission
from plainlora.data.datasets import row_numbers
from plainlora.data.layouts import (
    Schema,
    find_schema,
    has_answer,
    is_rendered,
    split_row,
    template_options,
    text_pair,
)
from plainlora.data.lengths import percentile_95
from plainlora.data.prompts import BrokenTemplate, Message, render, training_template, without_bos
from plainlora.data.spans import assistant_mask
from plainlora.errors import UserError

IGNORED = -100
ROUNDING = 1e-6  # rows; 0.29 * 100 is less than 29
Overflow = Literal["drop", "truncate"]


@dataclass(frozen=True)
class EncodingReport:
    """Counts of encoded rows. Lengths are in tokens, before truncation.

    Attributes:
        where: The file or the Hub id, and the split.
        max_length: Longest row allowed; `None` for no limit.
        on_overflow: What happened to longer rows.
        max_truncated: Share of longer rows above which it is an error.
        eos_token: The tokenizer's EOS.
        rows: Number of rows read.
        kept: Number of rows trained on.
        too_long: Number of rows longer than `max_length`, which were dropped or truncated.
        eos_cut_off: Number of rows trained without their last EOS, because truncation cut it off.
        empty_answers: Number of rows whose answer is empty or white space.
        answers_cut_off: Number of rows dropped because truncation left no trained token.
        untrained: Number of rows dropped because they had no trained token before truncation.
        without_eos: Number of rows whose answer the template does not end with EOS.
        first_without_eos: Number of the first such row, from 1.
        merged_boundaries: Number of rows that do not begin with the tokens of the prompt at inference: the prompt's
            last token merges with the answer, or the template renders the prompt alone in another way.
        first_merged: Number of the first such row, from 1.
        longest: Length of the longest row.
        median: Median length.
        percentile_95: Length that 95 % of the rows do not exceed.
        tokens: Number of tokens in the kept rows.
        trained_tokens: Number of trained tokens among them; the first one of a row is never predicted.
        largest_id: The largest token id in the rows.
        losses: What the chat template leaves out of the rows.
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
    losses: tuple[Omission, ...] = ()

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
            (self.merged_boundaries, "that do not begin with the tokens of their prompt"),
        ):
            if count:
                parts.append(f"{count:,} {fate}")
        return "; ".join(parts)

    def faults(self) -> dict[str, str]:
        """Why these rows must not be trained on, each with what to do, by the name of the check."""
        found = {}
        named = "name the roles user and assistant, " * any(omission.kind == "roles" for omission in self.losses)
        for omission in self.losses:
            if omission.kind == "answer":
                found["answer"] = (
                    f"{self.where} row {omission.first}: {omission.what}, so an empty answer would be trained "
                    f"({omission.rows:,} of {self.rows:,} rows); {named}set prompt_template to one that renders it, "
                    "or remove such rows"
                )
        if self.without_eos:
            found["eos"] = (
                f"{self.where} row {self.first_without_eos}: the chat template does not end answers with the "
                f"tokenizer's EOS {self.eos_token!r}, so the model would never learn to stop; set eos_token to the "
                "token that ends them, or prompt_template to one that does"
            )
        if self.empty_answers == self.rows:
            found["empty"] = (
                f"{self.where}: no row has an answer, so the model would learn to answer nothing; look at the rows"
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
        """Raises `UserError` with the first reason why these rows must not be trained on, if there is one."""
        for fault in self.faults().values():
            raise UserError(fault)


class Encoder:
    """Turns a row into `input_ids` and `labels`, the same as SFTTrainer's.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py (`tokenize_fn`, `build_labels`)

    Args:
        tokenizer: A tokenizer with the chat template installed and an EOS token.
        schema: The layout of the rows.
        text_column: The column of plain text, for the schema `text`.
        answers_only: Whether only answers are trained: the text after the prompt, or all assistant messages of
            `messages`.
        assistant_only: Whether only the assistant's tokens are trained (TRL's `assistant_only_loss`).

    Raises:
        UserError: The rows do not separate the answer from the prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        schema: Schema,
        text_column: str,
        answers_only: bool,
        assistant_only: bool = False,
    ) -> None:
        if schema == "text" and (answers_only or assistant_only):
            raise UserError(
                f"{'completion' if answers_only else 'assistant'}_only_loss needs rows that tell the answer from the "
                f"prompt; the column {text_column!r} holds both as one text"
            )
        self.tokenizer, self.schema, self.text_column = tokenizer, schema, text_column
        if schema == "instruction":  # its one answer is the assistant's
            answers_only, assistant_only = answers_only or assistant_only, False
        self.masks_prompt = answers_only and schema != "messages"
        self.masks_others = assistant_only or (answers_only and schema == "messages")

    @cached_property
    def template(self) -> str | None:
        """The template that renders the rows; `None` for the tokenizer's own."""
        return training_template(self.tokenizer) if self.masks_others else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's `input_ids` and `labels`, and two flags.

        `prompt_is_prefix`: whether the row begins with the tokens of its prompt. `trains_eos`: whether its EOS is
        trained.
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
        options = {"chat_template": self.template, **template_options(row)}
        ids = self._tokenize(render([*prompt, *answer], self.tokenizer, options=options))
        prompt_length, prefix = self._inference_prefix(prompt, template_options(row), ids)
        labels = list(ids)
        if self.masks_prompt:
            shared = prompt_length
            if self.template is not None:
                shared = common_prefix_length(self._prompt_tokens(prompt, options), ids)
            labels = [IGNORED] * shared + ids[shared:]
        if self.masks_others:
            mask = assistant_mask([*prompt, *answer], ids, self.tokenizer, options)
            labels = [label if trained else IGNORED for label, trained in zip(labels, mask, strict=True)]
        trains_eos = self.tokenizer.eos_token_id in labels[prompt_length:]
        return {"input_ids": ids, "labels": labels, "prompt_is_prefix": prefix, "trains_eos": trains_eos}

    def _prompt_tokens(self, prompt: list[Message], options: dict[str, Any]) -> list[int]:
        """The tokens of the prompt at inference, with the generation prompt."""
        return self._tokenize(render(prompt, self.tokenizer, for_generation=True, options=options))

    def _inference_prefix(self, prompt: list[Message], options: dict[str, Any], ids: list[int]) -> tuple[int, bool]:
        """How many first tokens the row shares with its prompt at inference, and whether these are the whole prompt.

        The prompt is rendered with the saved template, even if another one rendered the row.
        """
        if self.schema == "messages" and not prompt:  # a conversation that begins with its answer has no prompt
            return 0, True
        try:
            asked = self._prompt_tokens(prompt, options)
        except BrokenTemplate:
            raise
        except UserError:
            if self.schema != "messages" and self.template is None:
                raise
            return 0, False
        shared = common_prefix_length(asked, ids)
        return shared, shared == len(asked)

    def _encode_texts(self, prompt: str, completion: str) -> dict[str, Any]:
        """The two texts joined without a template, with the tokenizer's own special tokens, as TRL (`add_eos`)."""
        if self.masks_others:
            raise UserError("assistant_only_loss needs messages; a prompt and a completion of text have no roles")
        eos = str(self.tokenizer.eos_token)
        completion = completion if completion.endswith(eos) else completion + eos
        prompt = without_bos(prompt, self.tokenizer)
        ids = list(self.tokenizer(prompt + completion, verbose=False).input_ids)
        prompt_ids = list(self.tokenizer(prompt, verbose=False).input_ids)
        shared = common_prefix_length(prompt_ids, ids)
        labels = [IGNORED] * shared + ids[shared:] if self.masks_prompt else list(ids)
        prefix = shared == len(prompt_ids)
        return {"input_ids": ids, "labels": labels, "prompt_is_prefix": prefix, "trains_eos": True}

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def trains_answers_only(schema: Schema, completion_only_loss: bool | None) -> bool:
    """`completion_only_loss`, or TRL's default for it: true for rows with a prompt and a completion."""
    return schema == "prompt" if completion_only_loss is None else completion_only_loss


def _trains(labels: list[int]) -> bool:
    """Whether a row has a trained token. The first token is never predicted, so its label does not count."""
    return any(label != IGNORED for label in labels[1:])


def _first(flags: list[bool], numbers: Sequence[int]) -> int | None:
    """Number of the first row whose flag is set."""
    return next((number for flag, number in zip(flags, numbers, strict=True) if flag), None)


def _count_omissions(rows: Iterable[list[Any]], numbers: Sequence[int]) -> tuple[Omission, ...]:
    found: dict[tuple[Any, str], list[int]] = {}
    for number, lost in zip(numbers, rows, strict=True):
        for kind, what in dict.fromkeys(map(tuple, lost)):
            found.setdefault((kind, what), []).append(number)
    return tuple(Omission(kind, what, len(numbers), numbers[0]) for (kind, what), numbers in found.items())


def _encode(rows: Dataset, encoder: Encoder, where: str, num_proc: int | None) -> Dataset:
    """Every row as `Encoder` returns it, with what `encode_rows` counts.

    Raises:
        UserError: A bad row; it is named.
    """
    coverage = Coverage(encoder.tokenizer)
    numbers = row_numbers(rows)

    def encode(row: dict[str, Any], at: int) -> dict[str, Any]:
        try:
            encoded = encoder(row)
        except BrokenTemplate:  # not the fault of a row
            raise
        except UserError as error:
            raise UserError(f"{where} row {numbers[at]}: {error}") from error
        found = {"length": len(encoded["input_ids"]), "largest": max(encoded["input_ids"], default=0)}
        found |= {"trained": _trains(encoded["labels"]), "answered": has_answer(row, encoder.schema)}
        if is_rendered(row, encoder.schema):
            prompt, answer = split_row(row, encoder.schema)
            lost = coverage([*prompt, *answer], {"chat_template": encoder.template, **template_options(row)})
        else:
            lost = []
        return encoded | found | {"lost": [list(omission) for omission in lost]}

    # No cache: its fingerprint does not change with this project's code.
    return rows.map(
        encode,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc=f"Tokenizing {where}",
    ).with_format(None)


def _truncate(encoded: Dataset, max_length: int, keep_end: bool, eos: int) -> Dataset:
    """The rows cut to `max_length`; `eos_cut_off` is whether a row is trained without its last EOS."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        ids, labels = row["input_ids"], row["labels"]
        if row["length"] <= max_length:
            return {"input_ids": ids, "labels": labels, "eos_cut_off": False}
        kept = slice(-max_length, None) if keep_end else slice(None, max_length)
        lost = eos in labels[max_length:] and not keep_end and _trains(labels[kept])
        return {"input_ids": ids[kept], "labels": labels[kept], "eos_cut_off": lost}

    return encoded.map(cut, keep_in_memory=True, load_from_cache_file=False, desc="Truncating long rows")


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
    assistant_only: bool = False,
) -> tuple[Dataset, EncodingReport]:
    """Renders and tokenises every row, then drops or truncates rows that are too long.

    Whether the rows may be trained on is not checked here; see `EncodingReport.faults`.

    Args:
        rows: The rows as read.
        tokenizer: A tokenizer with the chat template installed.
        where: The rows' name in messages: the file or the Hub id.
        text_column: The column of plain text, if the rows are plain text.
        answers_only: Whether only answers are trained; see `Encoder`.
        max_length: Longest row in tokens; `None` for no limit.
        on_overflow: What happens to longer rows.
        max_truncated: Share of longer rows above which it is a fault.
        keep_end: Whether truncation keeps the end of a row instead of its start.
        num_proc: Number of processes that tokenise.
        assistant_only: Whether only the assistant's tokens are trained; see `Encoder`.

    Returns:
        The rows with `input_ids` and `labels`, and the report.

    Raises:
        UserError: No usable columns, or a bad row.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so the model would never learn to stop; set eos_token")
    schema = find_schema(rows, text_column, where)
    try:
        encoder = Encoder(tokenizer, schema, text_column, answers_only, assistant_only)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    encoded = _encode(rows, encoder, where, num_proc)
    numbers = row_numbers(rows)
    lengths, merged = encoded["length"][:], [not is_prefix for is_prefix in encoded["prompt_is_prefix"]]
    without_eos = [trains and not ends for trains, ends in zip(encoded["trained"], encoded["trains_eos"], strict=True)]
    too_long = sum(max_length is not None and length > max_length for length in lengths)
    left = encoded
    if too_long and max_length is not None:
        if on_overflow == "drop":
            left = encoded.filter(
                lambda length: length <= max_length,
                input_columns="length",
                keep_in_memory=True,
                desc="Dropping long rows",
            )
        else:
            left = _truncate(encoded, max_length, keep_end, tokenizer.eos_token_id)
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
        first_without_eos=_first(without_eos, numbers),
        merged_boundaries=sum(merged),
        first_merged=_first(merged, numbers),
        longest=max(lengths),
        median=statistics.median(lengths),
        percentile_95=percentile_95(lengths),
        tokens=sum(len(ids) for ids in trainable["input_ids"]),
        trained_tokens=sum(label != IGNORED for labels in trainable["labels"] for label in labels[1:]),
        largest_id=max(encoded["largest"]),
        losses=_count_omissions(encoded["lost"], numbers),
    )
    return trainable.select_columns(["input_ids", "labels"]), report
