"""Hub id or local file -> rows, every field checked."""

import codecs
import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import Dataset
from datasets.table import InMemoryTable
from pyarrow import BufferReader, parquet  # type: ignore[import-untyped]
from trl.trainer.utils import remove_none_values

from plainlora.errors import UserError, first_line

FORMATS = ("json", "jsonl", "csv", "tsv", "parquet")


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return name.rpartition(".")[2] if "." in name else ""


def is_local(name: str) -> bool:
    """Whether a dataset or model name is a local path: it exists, or is not written as a Hub id."""
    return os.path.exists(name) or name.startswith(("/", ".", "~")) or _suffix(Path(name)) in FORMATS


def find_local_file(name: str, split: str) -> Path | None:
    """The file of a split: the file itself, or `SPLIT.json` and the like in a folder. `None` if there is none.

    Raises:
        UserError: There is no such path, or its format is not supported.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        found = sorted(
            file for file in path.iterdir() if file.name.split(".")[0] == split and _suffix(file) in FORMATS
        )
        if len(found) > 1:
            raise UserError(
                f"{path} holds several files for {split}: {', '.join(file.name for file in found)}; keep one"
            )
        return found[0] if found else None
    if not os.path.isfile(path):
        raise UserError(f"there is no file {name}; give a Hub id, a folder, or a {', '.join(FORMATS)} file")
    if _suffix(path) not in FORMATS:
        raise UserError(f"{path} is not in a format that is read: {', '.join(FORMATS)}, each also as .gz")
    return path


def _read_bytes(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not content.strip():
        raise UserError(f"{path} is empty")
    return content


def _read_text(path: Path) -> str:
    """UTF-8, with or without the byte order mark that Windows editors write."""
    content = _read_bytes(path)
    if b"\0" in content and not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is binary, not text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON list or of JSON lines, each with its position."""
    text = _read_text(path)
    first = 1
    try:
        if text.lstrip().startswith("["):
            yield from ((f"row {number}", row) for number, row in enumerate(json.loads(text), 1))
            return
        for first, line in enumerate(text.split("\n"), 1):  # not splitlines(): a string may hold U+2028
            if line.strip():
                yield f"line {first}", json.loads(line)
    except json.JSONDecodeError as error:
        if first == 1 and _is_one_object(text):
            raise UserError(
                f"{path} is one object over several lines; write each on one line, or all as a list"
            ) from error
        raise UserError(f"{path} line {first + error.lineno - 1}: malformed JSON ({error.msg})") from error
    except RecursionError as error:
        raise UserError(f"{path} line {first}: malformed JSON (too deeply nested)") from error
    except ValueError as error:  # a number of more than 4,300 digits
        raise UserError(f"{path} line {first}: malformed JSON ({error})") from error


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _read_json(path: Path) -> Dataset:
    columns: dict[str, list[Any]] = {}
    for number, (where, row) in enumerate(_json_rows(path)):
        if not isinstance(row, dict):
            raise UserError(f"{path} {where}: a row must be an object, not {type(row).__name__}")
        for name in row:
            columns.setdefault(name, [None] * number)
        for name, values in columns.items():
            values.append(row.get(name))
    as_text = tuple(name for name, values in columns.items() if not _has_one_type(values))
    for name in as_text:
        columns[name] = [json.dumps(value, ensure_ascii=False) for value in columns[name]]
    try:
        rows = Dataset.from_dict(columns)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {_unstorable(columns)} cannot be stored ({error})") from error
    return rows.with_transform(partial(_parsed, as_text)) if as_text else rows


def _has_one_type(values: Sequence[Any]) -> bool:
    """Whether a column holds texts alone, or numbers of one type alone, or nulls.

    Other columns are kept as JSON. Arrow would fill messages up with the fields that others have, and the `Json` type
    of `datasets` (5.2.0) rounds numbers to ten digits, and reads a text such as `42` as a number:
    https://github.com/huggingface/datasets/blob/5.2.0/src/datasets/utils/json.py
    """
    types = {type(value) for value in values} - {type(None)}
    return len(types) <= 1 and not types & {list, dict}


def _parsed(names: Sequence[str], batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """A batch with the values of these columns read from JSON."""
    return {name: list(map(json.loads, values)) if name in names else values for name, values in batch.items()}


def _unstorable(columns: dict[str, list[Any]]) -> str:
    """The first value that Arrow cannot store, such as a number of more than 64 bits or half of a surrogate pair."""
    for name, values in columns.items():
        for number, value in enumerate(values, 1):
            try:
                Dataset.from_dict({name: [value]})
            except (TypeError, ValueError, OverflowError):
                return f"row {number}: {name!r}"
    return "a value"


def _read_csv(path: Path, columns: list[str] | None = None) -> Dataset:
    """Every field is text. A tsv is read without quoting, because SMS and tweets hold unbalanced quotes."""
    tabs = _suffix(path) == "tsv"
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(
        io.StringIO(_read_text(path), newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    header = columns
    rows: list[list[str]] = []
    start = 1
    try:
        for row in reader:
            if header is None:
                header = row or None  # skips blank lines
            elif columns is not None and row == columns:
                raise UserError(f"{path} line {start} is a header line; leave dataset_columns out")
            elif columns is not None and row and len(row) != len(columns):
                fields = f"{len(row)} field{'s' * (len(row) > 1)}"
                raise UserError(
                    f"{path} line {start}: {fields}, but dataset_columns names {len(columns)} ({', '.join(columns)})"
                )
            elif len(row) > len(header):
                raise UserError(f"{path} line {start}: {len(row)} fields, the header has {len(header)}")
            elif row:
                rows.append(row)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} line {start}: malformed {_suffix(path)} ({error})") from error
    header = header or []  # a byte order mark and nothing else
    if len(set(header)) < len(header):
        raise UserError(f"{path} line 1: a column name is given twice ({', '.join(header)})")
    fields_of = {name: [row[at] if at < len(row) else None for row in rows] for at, name in enumerate(header)}
    return Dataset.from_dict(fields_of, features=datasets.Features(dict.fromkeys(header, datasets.Value("string"))))


def _read_parquet(path: Path) -> Dataset:
    content = _read_bytes(path)
    try:
        table = parquet.ParquetFile(BufferReader(content)).read()
        table.validate(full=True)  # finds text that is not UTF-8, and wrong offsets
        return without_filled_nulls(Dataset(InMemoryTable(table)))
    except Exception as error:  # of many classes, if the schema is damaged
        raise UserError(f"{path} cannot be read as parquet: {error}") from error


def without_filled_nulls(rows: Dataset) -> Dataset:
    """The rows without the nulls that Arrow adds if a message or a tool lacks a field that another one has.

    Rows of JSON files have no such nulls.
    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/utils.py (`remove_none_values`)
    """
    nested = any(not isinstance(feature, datasets.Value) for feature in rows.features.values())
    return rows.with_transform(remove_none_values) if nested else rows


def read_file(path: Path, columns: list[str] | None = None) -> Dataset:
    """Reads one local file into memory.

    The `datasets` builders (5.2.0) are not used because they change values silently: in JSON they turn a text that is
    a date into a `datetime`, in messages too, and round numbers to nine decimals; in a csv whose lines have an extra
    field they drop the first field and shift the rest. They also do not say which line is malformed.

    Args:
        path: The file.
        columns: Names of the columns of a csv or tsv without a header line.

    Raises:
        UserError: The file is malformed (the line is named) or empty, or it has column names and `columns` is given.
    """
    kind = _suffix(path)
    if columns is None:
        return {"parquet": _read_parquet, "csv": _read_csv, "tsv": _read_csv}.get(kind, _read_json)(path)
    if kind not in ("csv", "tsv"):
        raise UserError(
            f"{path}: dataset_columns is for a csv or tsv without a header line; a {kind} file names its own"
        )
    if len(set(columns)) < len(columns):
        raise UserError(f"dataset_columns names a column twice ({', '.join(columns)})")
    return _read_csv(path, columns)


def load_split(name: str, split: str, config: str | None = None, columns: list[str] | None = None) -> Dataset | None:
    """The rows of a split, from the Hub or a local path; `None` if there is no such split.

    Args:
        name: Hub id, local folder or local file. A file is the split `train`.
        split: `train`, `test`, ... On the Hub also a slice such as `train[:1%]`.
        config: Configuration name on the Hub.
        columns: Names of the columns of a local csv or tsv without a header line.

    Raises:
        UserError: The rows cannot be read, or there are none.
    """
    if is_local(name):
        if "[" in split:  # a slice, as on the Hub
            whole, _, first = split.removesuffix("]").partition("[:")
            raise UserError(
                f"{name} is on this disk, and only a split of the Hub can be sliced ({split!r}); name the split "
                f"{whole.partition('[')[0]!r}, and take its first rows with --max_train_rows "
                f"{first if first.isdecimal() else 'N'}"
            )
        file = find_local_file(name, split)
        if file is None or (os.path.isfile(os.path.expanduser(name)) and split != "train"):
            return None
        rows = read_file(file, columns)
    elif columns is not None:
        raise UserError(f"{name} is on the Hub and names its own columns; leave dataset_columns out")
    else:
        try:
            rows = without_filled_nulls(cast(Dataset, datasets.load_dataset(name, config, split=split)))
        except ValueError as error:
            if "nknown split" in str(error):
                return None
            raise UserError(f"the dataset {name!r} cannot be loaded: {error}") from error
        except Exception as error:  # connection, authentication and not-found errors of several libraries
            reason = first_line(error)
            raise UserError(
                f"the dataset {name!r} cannot be loaded from the Hub ({reason}); give a local file with "
                "--dataset_name PATH, or run `make quickstart`, which needs no Hub"
            ) from error
    if len(rows) == 0:
        raise UserError(f"{name} ({split}) has no rows")
    return rows


def check_text_columns(rows: Dataset, columns: list[str], where: str, optional: bool = False) -> None:
    """Checks that every row has a string in each of these columns, or null if `optional`.

    Raises:
        UserError: A row has another value there. The error names the file and the row, counted from 1.
    """
    for column in columns:
        for number, value in enumerate(rows[column], 1):
            if not isinstance(value, str) and not (optional and value is None):
                what = "is missing or null" if value is None else f"is of type {type(value).__name__}, not text"
                raise UserError(f"{where} row {number}: {column!r} {what}; fix or remove the row")


def no_training_split(name: str, split: str) -> UserError:
    """The error for a training split that `load_split` did not find; it names what there is instead."""
    folder = Path(os.path.expanduser(name))
    if folder.is_file():
        return UserError(f"{name} is the split 'train', not {split!r}; leave dataset_train_split out")
    found = ", ".join(sorted(file.name for file in folder.iterdir())) if folder.is_dir() else ""
    return UserError(f"{name} has no split {split!r} (it holds {found or 'no files'}); set dataset_train_split")


def load_train_and_test(
    name: str,
    *,
    config: str | None,
    train_split: str,
    test_split: str,
    test_name: str | None,
    test_split_size: float | None,
    max_train_rows: int | None,
    seed: int,
    check: Callable[[Dataset, str], object] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Reads training rows, and test rows if there are any: another dataset, another split, or a held-out set.

    Args:
        name: Hub id, local folder or local file.
        config: Configuration name on the Hub.
        train_split: The split to train on.
        test_split: The split to test on, if there is one.
        test_name: Another dataset to test on.
        test_split_size: Size of the held-out set if there is no test split: a number of rows, or a share below 1.
        max_train_rows: How many of the first training rows to keep.
        seed: Seed of the held-out set.
        check: Called with the training rows and their name before any are held out; raises if they cannot be used.

    Raises:
        UserError: See `load_split`; or there is no training split, or the held-out set leaves nothing to train on.
    """
    train = load_split(name, train_split, config)
    if train is None:
        raise no_training_split(name, train_split)
    if check is not None:
        check(train, f"{name} (train)")
    if test_name is not None:
        if is_same_file(name, test_name):
            raise UserError(
                f"eval_dataset_name: {test_name} holds the training rows; give other rows, or hold some out with "
                "test_split_size"
            )
        test = load_split(test_name, test_split, config) or load_split(test_name, "train", config)
        if test is None:
            raise UserError(f"eval_dataset_name: {test_name} has neither a split {test_split!r} nor 'train'")
    else:
        test = None if test_split == train_split else load_split(name, test_split, config)
    if test is None and test_split_size:
        held_out = held_out_rows(test_split_size, len(train))
        if not 0 < held_out < len(train):
            raise UserError(f"test_split_size: {test_split_size:g} of {len(train)} rows leaves none to train on")
        parts = train.train_test_split(test_size=held_out, seed=seed)
        train, test = parts["train"], parts["test"]
    if max_train_rows is not None:
        train = train.select(range(min(max_train_rows, len(train))))
    return train, test


def evenly_spaced(rows: Dataset, count: int) -> Dataset:
    """So many rows of a data set, or all it has, at even distances: it may be sorted by class."""
    kept = min(count, len(rows))
    return rows.select([number * len(rows) // kept for number in range(kept)])


def held_out_rows(size: float, total: int) -> int:
    """How many of `total` rows a held-out set has: a number of rows, or a share below 1."""
    return int(size) if size >= 1 else math.ceil(round(size * total, 6))  # rounded: 0.07 * 100 is more than 7


def is_same_file(first: str, second: str) -> bool:
    """Whether two names are those of one file on this disk."""
    paths = [os.path.expanduser(name) for name in (first, second)]
    return all(map(os.path.isfile, paths)) and os.path.samefile(*paths)


def row_numbers(rows: Dataset) -> Sequence[int]:
    """The number of each row in its file or split, from 1. Rows drawn by a random split keep their numbers."""
    kept = rows._indices  # a table of one column; `None` for rows in the order in which they were read
    return range(1, len(rows) + 1) if kept is None else [index + 1 for index in kept.column(0).to_pylist()]


def hub_name(name: str) -> str | None:
    """The name if it is a Hub id, for the model card; `None` if it is a path."""
    return None if is_local(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else name
