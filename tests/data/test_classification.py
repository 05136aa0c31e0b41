"""Rows of text and label: how they are split, which classes they get, which tokens, and what is said of bad ones."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from plainlora.data.classification import LabelledSplits, encode_texts, load_labelled
from plainlora.errors import UserError

Pairs = list[tuple[Any, Any]]


def load(name: str | Path, **options: Any) -> LabelledSplits:
    defaults: dict[str, Any] = {
        "config": None, "train_split": "train", "validation_split": "validation", "test_split": "test",
        "validation_name": None, "test_name": None, "validation_size": None, "test_size": None, "columns": None,
        "text_column": "text", "label_column": "label", "labels": None, "balance": False, "on_empty": "drop",
        "max_train_rows": None, "max_eval_rows": None, "seed": 42,
    }  # fmt: skip
    return load_labelled(str(name), **(defaults | options))


def write(path: Path, pairs: Pairs) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    return path


def write_parquet(path: Path, pairs: Pairs, names: list[str] | None = None) -> Path:
    kind = Value("double") if names is None else ClassLabel(names=names)
    columns = {"text": [text for text, _ in pairs], "label": [label for _, label in pairs]}
    Dataset.from_dict(columns, features=Features({"text": Value("string"), "label": kind})).to_parquet(path)
    return path


def messages(ham: int, spam: int, prefix: str = "") -> Pairs:
    """Sorted by class, as files often are."""
    return [(f"{prefix}{number}", "ham") for number in range(ham)] + [
        (f"{prefix}{number}", "spam") for number in range(ham, ham + spam)
    ]


def texts(rows: Dataset | None) -> list[str]:
    assert rows is not None
    return list(rows["text"])


def counts(rows: Dataset | None) -> list[int]:
    """Rows of class 0, 1, ..."""
    assert rows is not None
    found = Counter(rows["label"])
    return [found[number] for number in range(max(found) + 1)]


FEW: Pairs = [("a", "ham"), ("b", "spam"), ("c", "ham")]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text("label,text\nham,a\nspam,b\nham,c\n")
    packed = tmp_path / "a.tsv.gz"
    packed.write_bytes(gzip.compress(b"label\ttext\nham\ta\nspam\tb\nham\tc\n"))
    numbered: Pairs = [("a", 0), ("b", 1), ("c", 0)]
    paths = [
        csv,
        packed,
        write(tmp_path / "a.jsonl", FEW),
        write_parquet(tmp_path / "a.parquet", numbered, ["ham", "spam"]),
    ]
    for path in paths:
        splits = load(path)
        assert splits.labels == ["ham", "spam"]
        assert splits.train.to_list() == [
            {"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": 0},
        ]  # fmt: skip
        assert splits.validation is None
        assert splits.test is None


def test_a_tsv_without_a_header_line_gives_every_row_in_spite_of_unbalanced_quotes(tmp_path: Path) -> None:
    path = tmp_path / "sms.tsv"
    path.write_text('ham\t"Hello\nspam\tfree\nham\tshe said "hi\nham\tlast\n')
    splits = load(path, columns=["label", "sms"], text_column="sms")
    assert splits.train.to_list() == [
        {"text": '"Hello', "label": 0}, {"text": "free", "label": 1},
        {"text": 'she said "hi', "label": 0}, {"text": "last", "label": 0},
    ]  # fmt: skip


# Splits


def test_shares_are_of_all_rows_and_stratified(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", messages(80, 20))
    splits = load(path, validation_size=0.1, test_size=0.2)
    assert [counts(rows) for rows in (splits.train, splits.validation, splits.test)] == [[56, 14], [8, 2], [16, 4]]
    everything = texts(splits.train) + texts(splits.validation) + texts(splits.test)
    assert sorted(everything) == sorted(text for text, _ in messages(80, 20))
    assert splits.train.column_names == ["text", "label"]
    labels = dict(messages(80, 20))
    for rows in (splits.train, splits.validation, splits.test):
        assert rows is not None
        assert all(labels[row["text"]] == splits.labels[row["label"]] for row in rows)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"validation_size": 7, "test_size": 13}, (80, 7, 13)),
        ({"validation_size": 0.07, "test_size": 0.101}, (82, 7, 11)),
        ({"test_size": 0.3}, (70, None, 30)),
        ({"validation_size": 0.3, "test_size": 0}, (70, 30, None)),
    ],
)
def test_sizes_are_shares_or_numbers_of_rows(
    tmp_path: Path, sizes: dict[str, float], expected: tuple[int, int | None, int | None]
) -> None:
    path = write(tmp_path / "a.jsonl", messages(50, 50))
    splits = load(path, **sizes)
    found = (splits.train, splits.validation, splits.test)
    assert tuple(None if rows is None else len(rows) for rows in found) == expected


def test_odd_sizes_give_the_larger_remainder_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [(str(number), "abc"[number % 3]) for number in range(30)] + [(str(30 + n), "c") for n in range(3)])
    # 10, 10 and 13 of 33 rows: 8 rows are 2.42, 2.42 and 3.15 of them; 10 are 3.03, 3.03 and 3.94.
    assert counts(load(path, test_size=10).test) == [3, 3, 4]
    assert counts(load(path, test_size=8).test) == [3, 2, 3]


def test_the_seed_decides_which_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", messages(60, 40))
    options = {"validation_size": 0.1, "test_size": 0.2, "balance": True, "max_train_rows": 30, "max_eval_rows": 6}
    first, again, other = (load(path, **options, seed=seed) for seed in (1, 1, 2))
    for part in ("train", "validation", "test"):
        mine = texts(getattr(first, part))
        assert mine == texts(getattr(again, part))
        assert set(mine) != set(texts(getattr(other, part)))


def test_splits_that_exist_go_before_a_hold_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", messages(30, 10))
    write(tmp_path / "test.jsonl", messages(3, 5, "t"))
    splits = load(tmp_path, validation_size=0.1, test_size=0.5)
    assert [counts(rows) for rows in (splits.train, splits.validation, splits.test)] == [[27, 9], [3, 1], [3, 5]]
    assert texts(splits.test) == [text for text, _ in messages(3, 5, "t")]
    assert set(texts(splits.train)) | set(texts(splits.validation)) == {text for text, _ in messages(30, 10)}


@pytest.mark.parametrize("stem", ["validation", "valid", "val", "dev"])
def test_a_folder_may_call_its_validation_rows_by_another_name(tmp_path: Path, stem: str) -> None:
    write(tmp_path / "train.jsonl", messages(5, 5))
    write(tmp_path / f"{stem}.jsonl", messages(2, 1, "v"))
    assert texts(load(tmp_path, validation_size=2).validation) == ["v0", "v1", "v2"]
    assert load(tmp_path, validation_split="other").validation is None


def test_two_files_of_validation_rows_are_refused(tmp_path: Path) -> None:
    for name in ("train", "valid", "dev"):
        write(tmp_path / f"{name}.jsonl", FEW)
    with pytest.raises(UserError, match=r"several files for validation: valid.jsonl, dev.jsonl; keep one"):
        load(tmp_path)


def test_validation_and_test_rows_may_be_files_or_folders_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(tmp_path / "train.jsonl", messages(5, 5))
    write(tmp_path / "test.jsonl", messages(1, 1))
    write(folder / "val.jsonl", messages(2, 1, "v"))
    own = tmp_path / "own.csv"
    own.write_text("text,label\nx,spam\ny,ham\n")
    splits = load(tmp_path, validation_name=str(folder), test_name=str(own), validation_size=2, test_size=2)
    assert texts(splits.validation) == ["v0", "v1", "v2"]
    assert splits.test is not None
    assert splits.test.to_list() == [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
    assert len(splits.train) == 10
    with pytest.raises(UserError, match=r"eval_dataset_name: .*folder has neither a split 'test' nor 'train'"):
        load(tmp_path, test_name=str(folder))


def test_columns_name_the_columns_of_every_file(tmp_path: Path) -> None:
    for name, prefix in (("train", "a"), ("val", "b"), ("test", "c")):
        (tmp_path / f"{name}.tsv").write_text(f"ham\t{prefix}1\nspam\t{prefix}2\n")
    splits = load(tmp_path, columns=["label", "text"])
    assert [texts(rows) for rows in (splits.train, splits.validation, splits.test)] == [
        ["a1", "a2"], ["b1", "b2"], ["c1", "c2"],
    ]  # fmt: skip


def test_balance_cuts_every_class_before_the_split_and_leaves_other_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", messages(70, 30))
    write(tmp_path / "test.jsonl", messages(9, 2, "t"))
    splits = load(tmp_path, balance=True, validation_size=0.1)
    assert [counts(rows) for rows in (splits.train, splits.validation, splits.test)] == [[27, 27], [3, 3], [9, 2]]
    ham = {text for text in texts(splits.train) + texts(splits.validation) if int(text) < 70}
    assert ham != {str(number) for number in range(30)}  # not the first ones


def test_fewer_rows_are_drawn_from_all_classes_of_a_sorted_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", messages(60, 40))
    write(tmp_path / "test.jsonl", messages(30, 10, "t"))
    splits = load(tmp_path, max_train_rows=10, max_eval_rows=8, validation_size=0.2)
    assert [counts(rows) for rows in (splits.train, splits.validation, splits.test)] == [[6, 4], [5, 3], [6, 2]]
    assert not set(texts(splits.train)) & set(texts(splits.validation))
    splits = load(tmp_path, max_train_rows=100, max_eval_rows=99)
    assert counts(splits.train) == [60, 40]
    assert counts(splits.test) == [30, 10]


def test_test_texts_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [("a", "ham"), (" b\n", "spam"), ("c", "ham")])
    write(tmp_path / "test.jsonl", [("b  ", "ham"), ("B", "spam"), ("c", "spam"), ("c", "ham")])
    splits = load(tmp_path)
    assert splits.leaked["test"] == 3
    assert splits.line().endswith("; 3 test rows whose text is also a training row's")


def test_the_report_counts_every_class(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*messages(1500, 500), ("", "ham"), ("  ", "spam"), ("\n", "spam")])
    splits = load(path, test_size=20)
    assert splits.line() == (
        "train: 1,980 rows (1,485 ham, 495 spam); test: 20 rows (15 ham, 5 spam); 3 without text dropped"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_size": 10}, "test_split_size 10 of 10 rows leave none to train on"),
        ({"test_size": 0.5, "validation_size": 5}, "test_split_size 0.5 and validation_split_size 5 of 10 rows"),
        ({"test_size": 0.999}, "test_split_size 0.999 of 10 rows leave none to train on"),
        ({"validation_size": 2.5}, "validation_split_size: 2.5 is neither a share of the rows below 1 nor a whole"),
        ({"test_size": -1}, "test_split_size: -1 is neither"),
        ({"test_size": float("inf")}, "test_split_size: inf is neither"),
        ({"test_size": float("nan")}, "test_split_size: nan is neither"),
        ({"test_size": 1}, "1 test rows held out: no row of the class spam; raise test_split_size, or set balance_cl"),
        ({"validation_size": 8}, "the 2 rows left to train on: no row of the class spam; hold out fewer"),
        ({"max_train_rows": 1}, "1 of the train rows: no row of the class spam; raise max_train_rows, or set bal"),
        ({"max_eval_rows": 1, "test_size": 4}, "1 of the test rows: no row of the class spam; raise max_eval_rows"),
        ({"max_train_rows": 0}, "max_train_rows: 0 leaves no rows; leave it out to keep all"),
        ({"max_eval_rows": -3}, "max_eval_rows: -3 leaves no rows"),
        ({"test_split": "train"}, "dataset_test_split and dataset_train_split are both 'train'; name another"),
        ({"validation_split": "train"}, "dataset_validation_split and dataset_train_split are both 'train'"),
        ({"train_split": "main"}, "is the split 'train', not 'main'; leave dataset_train_split out"),
        ({"columns": ["a", "b"]}, "dataset_columns is for a csv or tsv without a header line"),
        ({"label_column": "text"}, "text_column and label_column are both 'text'"),
    ],
)  # fmt: skip
def test_a_split_that_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "a.jsonl", messages(8, 2)), **options)


def test_a_split_without_one_of_the_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", FEW)
    write(tmp_path / "dev.jsonl", [("x", "ham")])
    with pytest.raises(
        UserError,
        match=r"dev.jsonl as validation rows: no row of the class spam; .* set validation_dataset_name to other rows",
    ):
        load(tmp_path)
    path = write_parquet(tmp_path / "a.parquet", [("x", 0), ("y", 1)], ["neg", "pos", "mixed"])
    with pytest.raises(
        UserError, match=r"a.parquet as train rows: no row of the class mixed; add some, or set labels to the others"
    ):
        load(path)
    assert load(path, labels=["neg", "pos"]).labels == ["neg", "pos"]


# Labels


def test_the_given_names_decide_the_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("a", " ham "), ("b", "spam\n"), ("c", 0), ("d", 1), ("e", "0"), ("f", "1")])
    splits = load(path, labels=["spam", "ham "])
    assert splits.labels == ["spam", "ham"]
    assert list(splits.train["label"]) == [1, 0, 0, 1, 0, 1]


def test_without_names_the_distinct_labels_are_sorted(tmp_path: Path) -> None:
    stars = write(tmp_path / "a.jsonl", [(str(at), label) for at, label in enumerate((10, 9, " 2", "-1"))])
    splits = load(stars)
    assert splits.labels == ["-1", "2", "9", "10"]
    assert list(splits.train["label"]) == [3, 2, 1, 0]
    mixed = write(tmp_path / "b.jsonl", [(str(at), label) for at, label in enumerate(("x", 10, "9"))])
    assert load(mixed).labels == ["10", "9", "x"]


def test_a_number_is_a_name_where_classes_are_named_by_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("a", 1), ("b", 0), ("c", "1")])
    assert list(load(path, labels=["1", "0"]).train["label"]) == [0, 1, 0]
    path = write(tmp_path / "b.jsonl", [("a", 1), ("b", 2), ("c", 0)])
    with pytest.raises(UserError, match="row 3: 'label' is 0, expected one of 1, 2; fix"):  # not the class number 0
        load(path, labels=["1", "2"])
    with pytest.raises(UserError, match="row 2: 'label' is 2, expected one of 0, 1; fix"):
        load(path, labels=["0", "1"])


def test_a_class_label_is_read_by_its_names(tmp_path: Path) -> None:
    pairs: Pairs = [("a", 0), ("b", 1), ("c", 1)]
    write_parquet(tmp_path / "train.parquet", pairs, ["spam ", " ham"])
    write_parquet(tmp_path / "test.parquet", pairs, ["ham", "spam"])  # the same classes in another order
    splits = load(tmp_path)
    assert splits.labels == ["spam", "ham"]
    assert list(splits.train["label"]) == [0, 1, 1]
    assert splits.test is not None
    assert list(splits.test["label"]) == [1, 0, 0]
    splits = load(tmp_path, labels=["ham", "spam"])
    assert list(splits.train["label"]) == [1, 0, 0]
    assert list(splits.test["label"] if splits.test is not None else []) == [0, 1, 1]


def test_the_classes_of_a_class_label_may_be_given_other_words(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [("a", 0), ("b", 1)], ["neg", "pos"])
    write(tmp_path / "test.jsonl", [("c", "pos"), ("d", "negative"), ("e", 1)])
    splits = load(tmp_path, labels=["negative", "positive"])
    assert splits.labels == ["negative", "positive"]
    assert list(splits.train["label"]) == [0, 1]
    assert splits.test is not None
    assert list(splits.test["label"]) == [1, 0, 1]
    with pytest.raises(
        UserError, match=r"row 1: 'label' is 'neg', expected 'Neg' \(only the case differs\) or another of Pos, Neg"
    ):
        load(tmp_path, labels=["Pos", "Neg"])


def test_a_class_label_named_by_numbers_keeps_them_apart_from_class_numbers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [("a", 0), ("b", 1)], ["1", "2"])
    write(tmp_path / "test.jsonl", [("c", 1), ("d", "2")])
    splits = load(tmp_path, labels=["bad", "good"])
    assert list(splits.train["label"]) == [0, 1]
    assert splits.test is not None
    assert list(splits.test["label"]) == [0, 1]
    write(tmp_path / "test.jsonl", [("c", 1), ("d", 0)])
    with pytest.raises(UserError, match="row 2: 'label' is 0, expected one of bad, good; fix"):
        load(tmp_path, labels=["bad", "good"])


NAMES = ["neg", "pos"]
BAD_LABELS = {
    "a number below": (-1, NAMES, r"row 3: 'label' is -1, expected one of neg \(0\), pos \(1\); fix or remove"),
    "a number above": (2, NAMES, r"row 3: 'label' is 2, expected one of"),
    "null": (None, NAMES, r"row 3: 'label' is missing or null, expected one of neg \(0\), pos \(1\)"),
    "an unknown name": ("po", NAMES, r"row 3: 'label' is 'po', expected one of"),
    "another case": ("Pos", NAMES, r"row 3: 'label' is 'Pos', expected 'pos' \(only the case differs\) or another of"),
    "a decimal fraction": ("1.0", NAMES, r"row 3: 'label' is '1.0', expected one of"),
    "a float": (1.0, NAMES, r"row 3: 'label' is 1.0, expected one of"),
    "a truth value": (True, NAMES, r"row 3: 'label' is True, expected one of"),
    "a list": (["pos"], NAMES, r"row 3: 'label' is \['pos'\], expected one of"),
    "nothing": (" ", NAMES, r"row 3: 'label' is ' ', expected one of"),
    "a long text": ("x" * 99, NAMES, r"row 3: 'label' is 'x{59}, expected one of"),
    "null without names": (None, None, r"row 3: 'label' is missing or null, expected a class name or a whole number"),
    "a float without names": (0.5, None, r"row 3: 'label' is 0.5, expected a class name or a whole number"),
    "a truth value without names": (True, None, r"row 3: 'label' is True, expected a class name or a whole number"),
    "nothing without names": ("", None, r"row 3: 'label' is '', expected a class name or a whole number"),
    "another case without names": ("Pos", None, r"row 3: 'label' is 'Pos', expected 'pos' as in rows before"),
}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_bad_label_is_named_with_its_row(tmp_path: Path, case: str, part: str) -> None:
    label, labels, message = BAD_LABELS[case]
    rows: Pairs = [("a", "pos"), ("b", "neg"), ("c", label), ("d", "pos")]
    write(tmp_path / "train.jsonl", rows if part == "train" else rows[:2])
    write(tmp_path / "test.jsonl", rows if part == "test" else rows[:2])
    if part == "test" and labels is None:  # the training rows have decided the names
        message = r"row 3: 'label' is .*expected (one of neg \(0\), pos \(1\)|'pos' \(only the case differs\))"
    with pytest.raises(UserError, match=rf"{part}.jsonl {message}"):
        load(tmp_path, labels=labels)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, r"a.parquet row 3: 'label' is -1, expected one of neg \(0\), pos \(1\)"),  # IMDb's unsupervised rows
        (None, r"a.parquet row 3: 'label' is missing or null, expected one of neg \(0\)"),
    ],
)
def test_a_class_label_without_a_class_is_named_with_its_row(tmp_path: Path, label: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(write_parquet(tmp_path / "a.parquet", [("a", 0), ("b", 1), ("c", label)], NAMES))


def test_labels_that_are_floats_all_through_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 1: 'label' is 0.0, expected a class name or a whole number"):
        load(write_parquet(tmp_path / "a.parquet", [("a", 0.0), ("b", 1.0)]))


def test_a_classifier_needs_two_classes_each_named_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("a", "ham"), ("b", "ham")])
    with pytest.raises(UserError, match=r"'label' has no class but 'ham', and a classifier needs two; set labels, or"):
        load(path)
    with pytest.raises(UserError, match=r"no class but 'ham'"):
        load(path, labels=["ham"])
    with pytest.raises(UserError, match=r"no class but 'ham'"):
        load(write_parquet(tmp_path / "a.parquet", [("a", 0)], ["ham"]))
    for names in (["ham", "spam", " ham"], ["ham", " "]):
        with pytest.raises(UserError, match=r"labels: a class name is empty or given twice \(ham, "):
            load(path, labels=names)
    with pytest.raises(UserError, match="as train rows: no row of the class spam"):
        load(path, labels=["ham", "spam"], balance=True)


# Texts and columns


def test_newlines_that_end_a_text_are_removed_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [(" a  b \n", "ham"), ("\n c\nd\r\n\n", "spam"), ("e\u2028", "ham")])
    assert texts(load(path).train) == [" a  b ", "\n c\nd", "e\u2028"]


def test_rows_without_text_are_dropped_kept_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [("a", "ham"), ("", "spam"), (" \t\n", "ham"), ("b", "spam")])
    write(tmp_path / "test.jsonl", [("c", "ham"), ("d", "spam"), ("\u3000", "spam")])
    splits = load(tmp_path)
    assert (texts(splits.train), texts(splits.test)) == (["a", "b"], ["c", "d"])
    assert list(splits.train["label"]) == [0, 1]
    assert (splits.dropped_empty, splits.kept_empty) == (3, 0)
    splits = load(tmp_path, on_empty="keep")
    assert (texts(splits.train), texts(splits.test)) == (["a", "", " \t", "b"], ["c", "d", "\u3000"])
    assert list(splits.train["label"]) == [0, 1, 0, 1]
    assert (splits.dropped_empty, splits.kept_empty) == (0, 3)
    assert "3 without text kept" in splits.line()
    with pytest.raises(UserError, match=r"train.jsonl row 2: 'text' is empty; fix the row, or set on_empty to drop"):
        load(tmp_path, on_empty="error")


def test_a_class_whose_every_text_is_empty_is_missed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("a", "ham"), ("", "spam")])
    with pytest.raises(UserError, match="no row of the class spam; add some"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is missing or null"), (5, "is of type int, not text"), (["a"], "is of type list")]
)
def test_a_text_that_is_none_is_named_with_its_row(tmp_path: Path, text: object, message: str) -> None:
    write(tmp_path / "train.jsonl", FEW)
    write(tmp_path / "test.jsonl", [("a", "ham"), (text, "spam")])
    with pytest.raises(UserError, match=f"test.jsonl row 2: 'text' {message}"):
        load(tmp_path)


def test_a_missing_column_lists_the_columns_and_names_the_flag(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", FEW)
    for flag, option in (("--text_column", "text_column"), ("--label_column", "label_column")):
        with pytest.raises(UserError, match=rf"a.jsonl has the columns text, label, and no 'sms'; set {flag}$"):
            load(path, **{option: "sms"})
    headless = tmp_path / "a.tsv.gz"
    headless.write_bytes(gzip.compress(b"ham\t" + b"x" * 99 + b"\nspam\tb\n"))
    with pytest.raises(
        UserError,
        match=r"columns ham, x{40}, and no 'text'; set --text_column, or, if .* no header .*--dataset_columns$",
    ):
        load(headless)
    with pytest.raises(UserError, match=r"columns label, sms, and no 'text'; set --text_column, or fix --dataset_col"):
        load(headless, columns=["label", "sms"])


# Tokens


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, word pieces, [CLS] text [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[", "]", "a", "b", "c", "cl", "sep", "##s", "good", "film"]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=6,
    )  # fmt: skip


def rows_of(*sentences: str) -> Dataset:
    return Dataset.from_dict({"text": list(sentences), "label": [at % 2 for at in range(len(sentences))]})


def test_special_tokens_are_added_and_never_read_from_the_text(wordpiece: PreTrainedTokenizerFast) -> None:
    encoded, _ = encode_texts(rows_of("Good film", "a [SEP] b", "[CLS]", ""), wordpiece, None)
    assert encoded.column_names == ["input_ids", "labels", "length"]
    assert encoded["input_ids"][:] == [[2, 12, 13, 3], [2, 6, 4, 10, 5, 7, 3], [2, 4, 9, 11, 5, 3], [2, 3]]
    assert encoded["labels"][:] == [0, 1, 0, 1]
    assert encoded["length"][:] == [4, 7, 6, 2]


def test_the_end_of_text_in_a_text_is_spelled_out(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded, _ = encode_texts(rows_of("a<|endoftext|>b", "<|pad|>"), tokenizer, None)
    for ids, text in zip(encoded["input_ids"], ("a<|endoftext|>b", "<|pad|>"), strict=True):
        assert not {0, 1} & set(ids)
        assert tokenizer.decode(ids) == text


def test_a_cut_row_keeps_its_special_tokens_and_is_counted(wordpiece: PreTrainedTokenizerFast) -> None:
    rows = rows_of("a b c a b c a", "a b c", "a [SEP] b", "a")
    encoded, report = encode_texts(rows, wordpiece, 5)
    assert encoded["input_ids"][:] == [[2, 6, 7, 8, 3], [2, 6, 7, 8, 3], [2, 6, 4, 10, 3], [2, 6, 3]]
    assert encoded["length"][:] == [5, 5, 5, 3]
    assert (report.rows, report.cut, report.longest, report.median, report.mean) == (4, 2, 9, 6.0, 6.0)
    assert (
        report.line("train")
        == "train: 4 rows; tokens: median 6, mean 6.0, 95 % up to 9, longest 9; 2 cut to max_length"
    )
    uncut, report = encode_texts(rows, wordpiece, None)
    assert uncut["length"][:] == [9, 5, 7, 3]
    assert report.line("test") == "test: 4 rows; tokens: median 6, mean 6.0, 95 % up to 9, longest 9"


def test_a_length_without_place_for_text_is_refused(wordpiece: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="max_length: 2 has no place for text beside 2 special tokens; raise it"):
        encode_texts(rows_of("a"), wordpiece, 2)
    assert encode_texts(rows_of("a b"), wordpiece, 3)[0]["input_ids"][:] == [[2, 6, 3]]


def test_an_empty_text_becomes_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded, report = encode_texts(rows_of("", "a"), tokenizer, 4)
    assert encoded["input_ids"][0] == [tokenizer.eos_token_id]
    assert encoded["length"][:] == [1, 1]
    assert report.mean == 1.0
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match=r"makes no token of an empty text and has no BOS or EOS; .* with on_empty"):
        encode_texts(rows_of(""), bare, 4)
    begun = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|pad|>", eos_token="<|endoftext|>"
    )
    assert encode_texts(rows_of(""), begun, 4)[0]["input_ids"][:] == [[1]]


def test_validation_texts_that_are_trained_on_are_counted_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("same", "ham")] * 20 + [("other", "spam")] * 20)
    splits = load(path, validation_size=0.1)
    assert splits.validation is not None
    assert splits.leaked == {"validation": len(splits.validation)}


def test_one_file_under_two_names_is_still_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", FEW)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds the train rows and the test rows"):
        load("a.jsonl", test_name=str(tmp_path / "a.jsonl"))


def test_a_label_in_another_unicode_form_is_the_same_class(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("a", "caf\u00e9"), ("b", "cafe\u0301"), ("c", "th\u00e9")])
    for labels in (None, ["cafe\u0301", "th\u00e9"]):
        splits = load(path, labels=labels)
        assert splits.labels == ["caf\u00e9", "th\u00e9"]
        assert counts(splits.train) == [2, 1]
