"""Checks whether a classifier should be trained on the labelled texts."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from plainlora.data.labels import listed
from plainlora.doctor.finding import Examination
from plainlora.doctor.tokens import examine_ids, examine_saving
from plainlora.tasks.rows import PreparedTexts

MOSTLY_CUT = 0.5  # share of cut texts that is a warning
MANY = 10  # classes from which labels may be texts, or numbers for regression
RARE = 0.1  # of the largest class's size; with a smaller class accuracy is misleading


def examine_texts(
    texts: PreparedTexts, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None
) -> Examination:
    """Makes all checks of a classifier's texts and of the tokenizer.

    Args:
        texts: The prepared texts.
        tokenizer: The base's tokenizer.
        config: The base's config; `None` if it could not be loaded.
    """
    examination = Examination()
    if texts.missing:
        examination.add("error", "validation rows", "missing", texts.missing)
    for split, report in texts.reports.items():
        share, longest = report.cut / report.rows, f"the longest has {report.longest:,} tokens"
        level = "warning" if share > MOSTLY_CUT else "note" if report.cut else "ok"
        message = (
            f"{report.cut:,} ({share:.1%}) are cut to max_length; {longest}"
            if report.cut
            else f"none is cut; {longest}"
        )
        examination.add(level, f"{split} rows", "truncated", message, cut=report.cut, share=share)  # type: ignore[arg-type]
        examine_ids(report.largest_id, f"{split} rows", config, examination)
    _examine_classes(texts, examination)
    _examine_texts_as_read(texts, examination)
    examine_saving(tokenizer, rendered=False, examination=examination)
    return examination


def _examine_classes(texts: PreparedTexts, examination: Examination) -> None:
    sizes = list(texts.read.class_counts()["train"].values())
    alone = sizes.count(1)
    if len(sizes) >= MANY and 2 * alone > len(sizes):
        message = f"{alone:,} of {len(sizes):,} classes have only one row; does label_column hold texts, or numbers?"
        level = "error" if alone == len(sizes) else "warning"
        examination.add(level, "train rows", "single", message, classes=len(sizes), single=alone)  # type: ignore[arg-type]
    for split, counts in texts.read.class_counts().items():
        most = max(counts, key=lambda name: counts[name])
        share = counts[most] / sum(counts.values())
        named = listed([f"{count:,} {name}" for name, count in counts.items()])
        uneven = min(counts.values()) < RARE * counts[most]
        message = f"{named}; always {most!r:.40} would be right for {share:.1%}"
        if uneven:
            message += ", so look at F1 beside accuracy, or set balance_classes"
        examination.add("note" if uneven else "ok", f"{split} rows", "classes", message, counts=counts)


def _examine_texts_as_read(texts: PreparedTexts, examination: Examination) -> None:
    read = texts.read
    if read.dropped_empty or read.kept_empty:
        fate = f"{read.dropped_empty:,} are dropped" if read.dropped_empty else f"{read.kept_empty:,} are kept"
        examination.add("note", "all rows", "empty", f"rows without a text: {fate}")
    else:
        examination.add("ok", "all rows", "empty", "every row has a text")
    if read.contradicting:
        message = f"{read.contradicting:,} have the text of another row and another class; no model can learn both"
        examination.add("warning", "train rows", "contradicting", message, contradicting=read.contradicting)
    else:
        examination.add("ok", "train rows", "contradicting", "no text has two classes")
    for split, leaked in read.leaked.items():
        if leaked:
            rows = len(texts.by_split[split] or ())
            message = f"{leaked:,} of {rows:,} have the text of a training row, so the {split} figures are too good"
            examination.add("warning", f"{split} rows", "leaked", message, leaked=leaked)
        else:
            examination.add("ok", f"{split} rows", "leaked", "none has the text of a training row", leaked=0)
