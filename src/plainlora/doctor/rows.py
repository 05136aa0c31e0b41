"""Checks whether a language model should be trained on the encoded rows."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from plainlora.base.config import context_length
from plainlora.data.beginnings import Beginnings
from plainlora.data.coverage import Kind
from plainlora.data.encoding import EncodingReport
from plainlora.doctor.finding import Examination, Level
from plainlora.doctor.tokens import examine_ids, examine_padding, examine_saving
from plainlora.tasks.rows import PreparedRows

# What to do about omissions of the chat template. An omitted answer is an error of the report.
OMISSIONS: dict[Kind, tuple[Level, str]] = {
    "message": ("warning", "set prompt_template to one that renders it, or take it out of the rows"),
    "tool call": ("warning", "set prompt_template to one that renders it, or the model will not learn to make it"),
    "tools": (
        "warning",
        "set prompt_template to one that renders them, or the model learns to call tools that it is not shown",
    ),
    "template options": ("warning", "take it out, or set prompt_template to one that reads it"),
    "roles": ("warning", "inference asks for the assistant, so name the roles user and assistant"),
    "thinking": ("note", "it is not trained"),
    "fields": ("note", "it changes nothing"),
    "quoted": ("warning", "give them as an object: templates that expect one do not parse text"),
}


def examine_rows(
    rows: PreparedRows, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None
) -> Examination:
    """Makes all checks of the rows and of the tokenizer.

    Args:
        rows: The prepared rows.
        tokenizer: A tokenizer with the chat template installed.
        config: The base's config; `None` if it could not be loaded.
    """
    examination = Examination()
    if rows.missing:
        examination.add("error", "test rows", "missing", rows.missing)
    if rows.too_few:
        examination.add("error", "train rows", "batch", rows.too_few)
    for split, report in rows.reports.items():
        _examine_split(f"{split} rows", report, rows.rendered, examination)
        _examine_losses(f"{split} rows", report, examination)
        examine_ids(report.largest_id, f"{split} rows", config, examination)
        if report.max_length is None and config is not None:
            _examine_length(f"{split} rows", report.longest, config, examination)
    if rows.beginnings is not None:
        _examine_beginnings(rows.beginnings, tokenizer, examination)
    if rows.unread:
        message = f"nothing reads the column{'s' * (len(rows.unread) > 1)} {', '.join(rows.unread)} (from row 1 on)"
        examination.add("note", "train rows", "columns", message, unread=rows.unread)
    if rows.repeated:
        message = f"{rows.repeated:,} repeat the prompt of an earlier row"
        examination.add("note", "train rows", "repeated", message, repeated=rows.repeated)
    if rows.test is not None:
        _examine_leak(rows.leaked, rows.reports["test"].rows, examination)
    examine_saving(tokenizer, rows.rendered, examination)
    if len(rows.train):
        examine_padding(rows, tokenizer, examination)
    return examination


def _examine_split(subject: str, report: EncodingReport, rendered: bool, examination: Examination) -> None:
    faults = report.faults()
    for check, fault in faults.items():
        examination.add("error", subject, check, fault)
    share = report.too_long / report.rows
    long = f"{report.too_long:,} ({share:.2%}) are longer than max_length {report.max_length}"
    if report.eos_cut_off or report.answers_cut_off:
        message = (
            f"{long}: cut, {report.eos_cut_off:,} are trained without their EOS and {report.answers_cut_off:,} lose "
            "their whole answer; raise max_length, or leave on_overflow out"
        )
        examination.add("warning", subject, "cut off", message)
    if "truncated" not in faults:
        level = "note" if report.too_long else "ok"
        fate = "dropped" if report.on_overflow == "drop" else "truncated"
        message = f"{long} and {fate}" if report.too_long else f"none is longer than max_length {report.max_length}"
        examination.add(level, subject, "truncated", message, too_long=report.too_long, share=share)  # type: ignore[arg-type]
    if "eos" not in faults:
        ending = "every answer ends with EOS, and it is trained"
        if report.eos_cut_off:
            ending = (
                f"every answer that is not cut ends with EOS, and it is trained: {report.kept - report.eos_cut_off:,}"
            )
        examination.add("ok", subject, "eos", ending)
    if 0 < report.empty_answers < report.rows:
        message = (
            f"{report.empty_answers:,} of {report.rows:,} have an empty answer, which would be learned; remove them"
        )
        examination.add("warning", subject, "empty", message, empty=report.empty_answers)
    if report.untrained:
        message = f"{report.untrained:,} have no token to train on and are dropped; look for empty answers or texts"
        examination.add("warning", subject, "untrained", message, untrained=report.untrained)
    if report.merged_boundaries:
        cause = (
            "the template renders the prompt alone differently, or its last token merges with the answer"
            if rendered
            else "the prompt's last token merges with the answer"
        )
        message = (
            f"{report.merged_boundaries:,} do not begin with the tokens of their prompt (first in row "
            f"{report.first_merged:,}): {cause}, so generation starts from other tokens than training; end "
            "prompts, or the template's generation prompt, at a word boundary"
        )
        examination.add("warning", subject, "prompt is prefix", message, merged=report.merged_boundaries)
    else:
        prefix = "the inference prompt's tokens begin every row" if rendered else "no prompt merges with its answer"
        examination.add("ok", subject, "prompt is prefix", prefix)


def _examine_length(subject: str, longest: int, config: PretrainedConfig, examination: Examination) -> None:
    context = context_length(config)
    if context is not None and longest > context:
        message = (
            f"the longest of the {subject} has {longest:,} tokens, and the model's context is {context:,}; set "
            "max_length"
        )
        examination.add("error", subject, "length", message, longest=longest)


def _examine_losses(subject: str, report: EncodingReport, examination: Examination) -> None:
    for omission in report.losses:
        if omission.kind == "answer":
            continue
        level, advice = OMISSIONS[omission.kind]
        message = (
            f"in {omission.rows:,} of {report.rows:,} {omission.what} (first in row {omission.first:,}); {advice}"
        )
        examination.add(level, subject, omission.kind, message, rows=omission.rows, first=omission.first)


def _examine_beginnings(found: Beginnings, tokenizer: PreTrainedTokenizerBase, examination: Examination) -> None:
    if found.foreign:
        advice = f"write its own, {tokenizer.bos_token}, or take it out" if tokenizer.bos_token else "take it out"
        message = (
            f"{found.foreign_rows:,} begin with {found.foreign} (first in row {found.first_foreign:,}), which is not "
            f"a token of this tokenizer, so its characters are trained; {advice}"
        )
        examination.add("warning", "train rows", "foreign token", message, rows=found.foreign_rows)
    if found.others:
        message = (
            f"{found.others:,} do not begin as the chat template's prompts do, with {found.prompt!r} (first in row "
            f"{found.first_other:,}), so generation starts from another text than training; use rows of messages, "
            "or the prompt_template that the text is written in"
        )
        examination.add("warning", "train rows", "beginning", message, others=found.others)


def _examine_leak(leaked: int, rows: int, examination: Examination) -> None:
    if leaked:
        message = f"{leaked:,} of {rows:,} have the prompt of a training row, so the test figures are too good"
        examination.add("warning", "test rows", "leaked", message, leaked=leaked)
    else:
        examination.add("ok", "test rows", "leaked", "none has the prompt of a training row", leaked=0)
