"""Rows of text and label -> token ids and class numbers, with a count of every row that is left out."""

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from plainlora.data.datasets import (
    check_text_columns,
    find_local_file,
    held_out_rows,
    is_local,
    is_same_file,
    load_split,
    no_training_split,
)
from plainlora.data.labels import Classes, Table, listed
from plainlora.data.lengths import percentile_95
from plainlora.errors import UserError

OnEmpty = Literal["drop", "keep", "error"]
VALIDATION_STEMS = ("validation", "valid", "val", "dev")
NAME_FLAGS = {"validation": "validation_dataset_name", "test": "eval_dataset_name"}


@dataclass
class LabelledSplits:
    """A classifier's rows. Each has a `text` and a `label` from 0 to `len(labels) - 1`.

    Attributes:
        train: Training rows.
        validation: Rows to choose a checkpoint by, if there are any.
        test: Rows to report on, if there are any.
        labels: Name of each class, by number.
        dropped_empty: Number of rows dropped because their text was empty or white space, over all files read.
        kept_empty: Number of such rows that were kept.
        leaked: Number of validation and of test rows whose text, apart from surrounding white space, is also in a
            training row.
        contradicting: Number of training rows whose text another training row gives another class.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    labels: list[str]
    dropped_empty: int
    kept_empty: int
    leaked: dict[str, int]
    contradicting: int

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Number of rows of each class in each split."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        counts = {split: Counter(rows["label"]) for split, rows in splits.items() if rows is not None}
        return {split: {name: of[at] for at, name in enumerate(self.labels)} for split, of in counts.items()}

    def line(self) -> str:
        """The report in one line."""
        parts = []
        for split, counts in self.class_counts().items():
            classes = [f"{count:,} {name}" for name, count in counts.items()]
            parts.append(f"{split}: {sum(counts.values()):,} rows ({listed(classes)})")
        for count, what in (
            (self.dropped_empty, "without text dropped"),
            (self.kept_empty, "without text kept"),
            *((count, f"{part} rows whose text is also a training row's") for part, count in self.leaked.items()),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        return "; ".join(parts)


@dataclass
class TextReport:
    """Counts of tokenised texts. Lengths are in tokens, special tokens included, before truncation.

    Attributes:
        rows: Number of rows; all are kept.
        cut: Number of rows cut to `max_length`.
        longest: Length of the longest row.
        median: Median length.
        mean: Mean length.
        percentile_95: Length that 95 % of the rows do not exceed.
        largest_id: The largest token id in the rows.
    """

    rows: int
    cut: int
    longest: int
    median: float
    mean: float
    percentile_95: int
    largest_id: int

    def line(self, title: str) -> str:
        """The report in one line."""
        line = f"{title}: {self.rows:,} rows; tokens: median {self.median:.0f}, mean {self.mean:.1f}"
        line += f", 95 % up to {self.percentile_95:,}, longest {self.longest:,}"
        return f"{line}; {self.cut:,} cut to max_length" if self.cut else line


def _find_split(name: str, split: str, config: str | None, columns: list[str] | None) -> Table | None:
    if not is_local(name):
        rows = load_split(name, split, config, columns)
        return None if rows is None else Table(rows, f"{name} ({split})")
    in_folder = Path(name).expanduser().is_dir()
    stems = VALIDATION_STEMS if in_folder and split == "validation" else (split,)
    files = {stem: file for stem in stems if (file := find_local_file(name, stem)) is not None}
    if len(files) > 1:
        found = ", ".join(file.name for file in files.values())
        raise UserError(f"{name} holds several files for {split}: {found}; keep one")
    stem = next(iter(files), split)
    rows = load_split(name, stem, config, columns)
    return None if rows is None else Table(rows, str(files[stem]))


def _find_tables(
    name: str,
    train_split: str,
    others: dict[str, tuple[str | None, str]],
    config: str | None,
    columns: list[str] | None,
) -> dict[str, Table]:
    """The rows of `train` and of each other part that exists: from its own dataset, or from its split."""
    for part, (own, split) in others.items():
        if own is None and split == train_split:
            raise UserError(
                f"dataset_{part}_split and dataset_train_split are both {split!r}; name another, or hold rows out"
            )
    table = _find_split(name, train_split, config, columns)
    if table is None:
        raise no_training_split(name, train_split)
    tables = {"train": table}
    for part, (own, split) in others.items():
        table = _find_split(own or name, split, config, columns)
        if own is not None and table is None:
            table = _find_split(own, "train", config, columns)
            if table is None:
                raise UserError(f"{NAME_FLAGS[part]}: {own} has neither a split {split!r} nor 'train'")
        if table is not None:
            for other, read in tables.items():
                if table.where == read.where or is_same_file(table.where, read.where):
                    raise UserError(
                        f"{table.where} holds the {other} rows and the {part} rows; give other rows for one of them, "
                        f"or hold some out with {part}_split_size"
                    )
            tables[part] = table
    return tables


def _check_texts(table: Table, text_column: str, label_column: str, named: bool) -> None:
    """Checks that both columns exist and every text is a string; `named`: dataset_columns names the columns."""
    for flag, column in (("--text_column", text_column), ("--label_column", label_column)):
        if column not in table.rows.column_names:
            advice = f"set {flag}"
            if named:
                advice += ", or fix --dataset_columns"
            elif table.where.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
                advice += ", or, if the file has no header line, name its columns with --dataset_columns"
            columns = listed(table.rows.column_names)
            raise UserError(f"{table.where} has the columns {columns}, and no {column!r}; {advice}")
    check_text_columns(table.rows, [text_column], table.where)


def _counts(rows: Dataset, classes: int) -> list[int]:
    counts = Counter(rows["label"])
    return [counts[number] for number in range(classes)]


def _draw(rows: Dataset, quotas: list[int], seed: int) -> tuple[Dataset, Dataset]:
    """Draws `quotas[c]` random rows of each class c; returns them and the rest, both shuffled."""
    classes, left = rows["label"][:], list(quotas)
    drawn: list[int] = []
    rest: list[int] = []
    for at in random.Random(seed).sample(range(len(rows)), len(rows)):
        (drawn if left[classes[at]] > 0 else rest).append(at)
        left[classes[at]] -= 1
    return rows.select(drawn), rows.select(rest)


def _stratified(rows: Dataset, size: int, classes: int) -> list[int]:
    """How many of `size` rows belong to each class if classes have the same shares as in all rows."""
    parts = [divmod(count * size, len(rows)) for count in _counts(rows, classes)]
    quotas = [whole for whole, _ in parts]
    by_remainder = sorted(range(classes), key=lambda number: -parts[number][1])
    for number in by_remainder[: size - sum(quotas)]:
        quotas[number] += 1
    return quotas


def _row_count(part: str, size: float, total: int) -> int:
    if not (0 < size < 1 or (size >= 1 and size % 1 == 0)):
        raise UserError(
            f"{part}_split_size: {size:g} is neither a share of the rows below 1 nor a whole number of them"
        )
    return held_out_rows(size, total)


def _check_classes(rows: Dataset, names: list[str], what: str, advice: str) -> None:
    missing = [name for name, count in zip(names, _counts(rows, len(names)), strict=True) if not count]
    if missing:
        raise UserError(f"{what}: no row of the class {listed(missing)}; {advice}")


def _hold_out(parts: dict[str, Dataset], sizes: dict[str, float], names: list[str], seed: int) -> None:
    """Moves rows from `parts["train"]` to held-out sets of these sizes."""
    rows = parts["train"]
    counts = {part: _row_count(part, size, len(rows)) for part, size in sizes.items()}
    if sum(counts.values()) >= len(rows):
        asked = " and ".join(f"{part}_split_size {size:g}" for part, size in sizes.items())
        raise UserError(f"{asked} of {len(rows)} rows leave none to train on")
    for part, count in counts.items():
        parts[part], rows = _draw(rows, _stratified(rows, count, len(names)), seed)
        _check_classes(
            parts[part], names, f"the {count} {part} rows held out", f"raise {part}_split_size, or set balance_classes"
        )
    if counts:
        _check_classes(rows, names, f"the {len(rows)} rows left to train on", "hold out fewer, or add rows")
    parts["train"] = rows


def _clean(table: Table, text_column: str, classes: Classes, on_empty: OnEmpty) -> tuple[Dataset, int]:
    """The rows as `text` and `label`, and the number of empty texts."""
    texts = [text.rstrip("\r\n") for text in table.rows[text_column]]
    full = [at for at, text in enumerate(texts) if text.strip()]
    rows = Dataset.from_dict({"text": texts, "label": classes.numbers(table)})
    if on_empty == "error" and len(full) < len(texts):
        row = next(at for at, text in enumerate(texts, 1) if not text.strip())
        raise UserError(f"{table.where} row {row}: {text_column!r} is empty; fix the row, or set on_empty to drop")
    return rows if on_empty == "keep" else rows.select(full), len(texts) - len(full)


def _clean_all(
    tables: dict[str, Table], text_column: str, classes: Classes, on_empty: OnEmpty
) -> tuple[dict[str, Dataset], int]:
    """The rows of every part as `text` and `label`, each with all classes, and the number of empty texts."""
    parts = {}
    empty = 0
    for part, table in tables.items():
        parts[part], count = _clean(table, text_column, classes, on_empty)
        empty += count
        remedy = "labels to the others" if part == "train" else f"{NAME_FLAGS[part]} to other rows"
        advice = f"add some, or set {remedy}"
        if table.where.endswith("])"):  # a slice on the Hub
            advice = "a slice of a sorted split lacks classes; max_train_rows and max_eval_rows draw from all rows"
        _check_classes(parts[part], classes.names, f"{table.where} as {part} rows", advice)
    return parts, empty


def _limit(
    parts: dict[str, Dataset], max_train_rows: int | None, max_eval_rows: int | None, names: list[str], seed: int
) -> None:
    """Keeps at most `max_train_rows` or `max_eval_rows` rows of each part, drawn at random, stratified by label."""
    for part, rows in parts.items():
        most, flag = (max_train_rows, "max_train_rows") if part == "train" else (max_eval_rows, "max_eval_rows")
        if most is not None and most < len(rows):
            parts[part], _ = _draw(rows, _stratified(rows, most, len(names)), seed)
            _check_classes(parts[part], names, f"{most} of the {part} rows", f"raise {flag}, or set balance_classes")


def _leaked(train: Dataset, test: Dataset) -> int:
    trained = {text.strip() for text in train["text"]}
    return sum(text.strip() in trained for text in test["text"])


def _contradicting(rows: Dataset) -> int:
    texts = [text.strip() for text in rows["text"]]
    classes: dict[str, set[int]] = {}
    for text, label in zip(texts, rows["label"], strict=True):
        classes.setdefault(text, set()).add(label)
    return sum(len(classes[text]) > 1 for text in texts)


def load_labelled(
    name: str,
    *,
    config: str | None,
    train_split: str,
    validation_split: str,
    test_split: str,
    validation_name: str | None,
    test_name: str | None,
    validation_size: float | None,
    test_size: float | None,
    columns: list[str] | None,
    text_column: str,
    label_column: str,
    labels: list[str] | None,
    balance: bool,
    on_empty: OnEmpty,
    max_train_rows: int | None,
    max_eval_rows: int | None,
    seed: int,
) -> LabelledSplits:
    """Reads training rows, and validation and test rows if there are any, with checked texts and numbered labels.

    Validation and test rows come from a dataset of their own, else from the split of that name, else from a held-out
    set of the training rows. A label is a class name; or a class number, if no class is named by a number.

    Args:
        name: Hub id, local folder or local file. A file is the split `train`.
        config: Configuration name on the Hub.
        train_split: Split to train on.
        validation_split: Split for validation rows. In a local folder `validation` is also `valid`, `val` or `dev`.
        test_split: Split for test rows.
        validation_name: Hub id or path of the validation rows, if it is another dataset.
        test_name: Hub id or path of the test rows, if it is another dataset.
        validation_size: Size of the held-out validation set, if there are no validation rows: a number of rows, or
            below 1 a share of the training rows before any are held out. Stratified by label.
        test_size: The same for test rows.
        columns: Names of the columns of csv or tsv files without a header line.
        text_column: The column of texts. Newlines at the end of a text are removed.
        label_column: The column of labels.
        labels: Names of the classes, in order; `None` for a ClassLabel's names, or else the training rows' sorted
            distinct labels.
        balance: Whether every class is cut to the size of the smallest, before rows are held out. Validation and
            test rows of their own are not cut.
        on_empty: What happens to rows whose text is empty or white space.
        max_train_rows: How many training rows to keep. They are drawn at random, stratified by label, because files
            are often sorted by class, as IMDb is on the Hub.
        max_eval_rows: How many validation rows and test rows to keep, drawn in the same way.
        seed: Seed of all random draws.

    Raises:
        UserError: The rows cannot be read, a row cannot be used (it is named), or a split would lack a class.
    """
    if text_column == label_column:
        raise UserError(f"text_column and label_column are both {text_column!r}")
    for flag, most in (("max_train_rows", max_train_rows), ("max_eval_rows", max_eval_rows)):
        if most is not None and most < 1:
            raise UserError(f"{flag}: {most} leaves no rows; leave it out to keep all")
    others = {"validation": (validation_name, validation_split), "test": (test_name, test_split)}
    tables = _find_tables(name, train_split, others, config, columns)
    for table in tables.values():
        _check_texts(table, text_column, label_column, named=columns is not None)
    classes = Classes(tables["train"], label_column, labels)
    parts, empty = _clean_all(tables, text_column, classes, on_empty)
    if balance:
        counts = _counts(parts["train"], len(classes.names))
        parts["train"], _ = _draw(parts["train"], [min(counts)] * len(counts), seed)
    shares = {"test": test_size, "validation": validation_size}
    _hold_out(parts, {part: size for part, size in shares.items() if size and part not in parts}, classes.names, seed)
    _limit(parts, max_train_rows, max_eval_rows, classes.names, seed)
    return LabelledSplits(
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts.get("test"),
        labels=classes.names,
        dropped_empty=empty if on_empty == "drop" else 0,
        kept_empty=empty if on_empty == "keep" else 0,
        leaked={part: _leaked(parts["train"], rows) for part, rows in parts.items() if part != "train"},
        contradicting=_contradicting(parts["train"]),
    )


def tokenize_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[list[list[int]], list[int]]:
    """Token ids of every text, cut to `max_length`, and the number of tokens before the cut.

    Text that spells a special token does not become that token.

    Raises:
        UserError: An empty text has no tokens.
    """
    found = tokenizer(list(texts), split_special_tokens=True, verbose=False).input_ids
    found = [ids or [_token_for_nothing(tokenizer)] for ids in found]
    lengths = [len(ids) for ids in found]
    long = [at for at, length in enumerate(lengths) if max_length is not None and length > max_length]
    if long:
        again = tokenizer(
            [texts[at] for at in long], split_special_tokens=True, truncation=True, max_length=max_length
        )
        for at, ids in zip(long, again.input_ids, strict=True):
            found[at] = ids
    return found, lengths


def encode_texts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Dataset, TextReport]:
    """Tokenises every text, with the special tokens that the tokenizer adds itself.

    Args:
        rows: Rows with `text` and `label`, from `load_labelled`.
        tokenizer: The model's tokenizer.
        max_length: Length to which a row is cut, in tokens, special tokens included; `None` for no limit.

    Returns:
        The rows with `input_ids`, `labels` (the class number) and `length` (tokens), and the report.

    Raises:
        UserError: `max_length` has no place for text, or an empty text has no tokens.
    """
    added = tokenizer.num_special_tokens_to_add()
    if max_length is not None and max_length <= added:
        raise UserError(f"max_length: {max_length} has no place for text beside {added} special tokens; raise it")

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded, uncut = tokenize_texts(batch["text"], tokenizer, max_length)
        lengths = [len(ids) for ids in encoded]
        largest = [max(ids) for ids in encoded]
        return {"input_ids": encoded, "labels": batch["label"], "length": lengths, "uncut": uncut, "largest": largest}

    # No cache: its fingerprint does not change with this project's code.
    encoded = rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc="Tokenizing",
    )
    uncut = encoded["uncut"][:]
    report = TextReport(
        rows=len(uncut),
        cut=sum(max_length is not None and length > max_length for length in uncut),
        longest=max(uncut),
        median=statistics.median(uncut),
        mean=statistics.fmean(uncut),
        percentile_95=percentile_95(uncut),
        largest_id=max(encoded["largest"]),
    )
    return encoded.remove_columns(["uncut", "largest"]), report


def _token_for_nothing(tokenizer: PreTrainedTokenizerBase) -> int:
    """The one token of an empty text: GPT-2's tokenizer makes none, and a model needs at least one."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError(
        "the tokenizer makes no token of an empty text and has no BOS or EOS; drop such rows with on_empty"
    )
