"""Whether rows of a language model may be trained on, from what became of them on the way to tokens."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from plainlora.data.encoding import EncodingReport
from plainlora.doctor.finding import Examination
from plainlora.doctor.tokens import examine_ids, examine_padding, examine_saving
from plainlora.training.preparation import PreparedRows


def examine_rows(
    rows: PreparedRows, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None
) -> Examination:
    """Every check of the rows and of the tokenizer that made them.

    Args:
        rows: As they go to the trainer.
        tokenizer: With the template installed.
        config: The base's; `None` if it could not be had.
    """
    examination = Examination()
    if rows.missing:
        examination.add("error", "test rows", "there", rows.missing)
    if rows.too_few:
        examination.add("error", "train rows", "batch", rows.too_few)
    for split, report in rows.reports.items():
        _examine_split(f"{split} rows", report, rows.rendered, examination)
        examine_ids(report.largest_id, f"{split} rows", config, examination)
    if rows.repeated:
        said = f"{rows.repeated:,} ask what a row before them asks"
        examination.add("note", "train rows", "repeated", said, repeated=rows.repeated)
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
        said = (
            f"{long}: cut, {report.eos_cut_off:,} are trained without their EOS and {report.answers_cut_off:,} lose "
            "their whole answer; raise max_length, or leave on_overflow out"
        )
        examination.add("warning", subject, "cut off", said)
    if "truncated" not in faults:
        level = "note" if report.too_long else "ok"
        fate = "dropped" if report.on_overflow == "drop" else "truncated"
        said = f"{long} and {fate}" if report.too_long else f"none is longer than max_length {report.max_length}"
        examination.add(level, subject, "truncated", said, too_long=report.too_long, share=share)  # type: ignore[arg-type]
    if "eos" not in faults:
        ending = "every answer ends with EOS, and it is trained"
        if report.eos_cut_off:
            ending = (
                f"every answer that is not cut ends with EOS, and it is trained: {report.kept - report.eos_cut_off:,}"
            )
        examination.add("ok", subject, "eos", ending)
    if 0 < report.empty_answers < report.rows:
        said = (
            f"{report.empty_answers:,} of {report.rows:,} have an empty answer, and teach to say nothing; remove them"
        )
        examination.add("warning", subject, "empty", said, empty=report.empty_answers)
    if report.untrained:
        said = f"{report.untrained:,} have no token to train on and are dropped; look for empty answers or texts"
        examination.add("warning", subject, "untrained", said, untrained=report.untrained)
    if report.merged_boundaries:
        said = (
            f"in {report.merged_boundaries:,} the prompt's last token merges with the answer (first in row "
            f"{report.first_merged:,}), so generation starts from other tokens than were trained; end prompts, or the "
            "template's generation prompt, at a word boundary"
        )
        examination.add("warning", subject, "prompt is prefix", said, merged=report.merged_boundaries)
    else:
        prefix = "the inference prompt's tokens begin every row" if rendered else "no prompt merges with its answer"
        examination.add("ok", subject, "prompt is prefix", prefix)


def _examine_leak(leaked: int, rows: int, examination: Examination) -> None:
    if leaked:
        said = f"{leaked:,} of {rows:,} ask what a training row asks; the test figures flatter by as much"
        examination.add("warning", "test rows", "leaked", said, leaked=leaked)
    else:
        examination.add("ok", "test rows", "leaked", "none asks what a training row asks", leaked=0)
