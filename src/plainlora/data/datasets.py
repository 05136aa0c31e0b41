"""Hub id or local file -> rows, every field checked."""

import csv
import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import datasets
from datasets import Dataset

from plainlora.errors import UserError

BUILDERS = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}


class _Tsv(csv.excel_tab):
    """Tabs, and no quoting: SMS and tweets hold unbalanced quotes."""

    quoting = csv.QUOTE_NONE


def _suffix(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.rpartition(".")[2].lower() if "." in name else ""


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8"))
    return open(path, encoding="utf-8")


def is_local(name: str) -> bool:
    """Whether a dataset or model name means this disk: it exists, or is written as a path, not as a Hub id."""
    return Path(name).exists() or name.startswith(("/", ".", "~")) or _suffix(Path(name)) in BUILDERS


def find_local_file(name: str, split: str) -> Path | None:
    """The file of a split: the file itself, or `SPLIT.json` and the like in a folder. `None` if there is none.

    Raises:
        UserError: There is no such path, or its kind is not one that can be read.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(
            file for file in path.iterdir() if file.name.split(".")[0] == split and _suffix(file) in BUILDERS
        )
        if len(found) > 1:
            raise UserError(
                f"{path} holds several files for {split}: {', '.join(file.name for file in found)}; keep one"
            )
        return found[0] if found else None
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a Hub id, a folder, or a {', '.join(BUILDERS)} file")
    if _suffix(path) not in BUILDERS:
        raise UserError(f"{path} is of no kind that can be read: {', '.join(BUILDERS)}, each also as .gz")
    return path


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON list or of JSON lines, each with where it stands. Raises `UserError` at the first bad one."""
    with _open(path) as stream:
        text = stream.read()
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {error.lineno}: malformed JSON ({error.msg})") from error
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number}: malformed JSON ({error.msg})") from error


def _explain_json(path: Path, error: Exception) -> UserError:
    """Finds the row that Arrow could not read: Arrow's own message names none."""
    kinds: dict[str, str] = {}
    try:
        for where, row in _json_rows(path):
            if not isinstance(row, dict):
                return UserError(f"{path} {where}: a row must be an object, not {type(row).__name__}")
            for field, value in row.items():
                kind = type(value).__name__
                if value is not None and kinds.setdefault(field, kind) != kind:
                    return UserError(
                        f"{path} {where}: {field!r} is a {kind}, in the rows before it is a {kinds[field]}"
                    )
    except (UserError, OSError, UnicodeDecodeError, EOFError) as found:
        return found if isinstance(found, UserError) else UserError(f"{path} cannot be read: {found}")
    return UserError(f"{path} cannot be read as JSON: {error}")


def _explain_csv(path: Path, delimiter: str, error: Exception) -> UserError:
    """Finds the line with too many fields: the reader's own message may count from elsewhere."""
    try:
        with _open(path) as stream:
            dialect = _Tsv if delimiter == "\t" else csv.excel
            reader = csv.reader(stream, dialect, strict=True)
            header = next(reader, [])
            for row in reader:
                if len(row) > len(header):
                    return UserError(f"{path} line {reader.line_num}: {len(row)} fields, the header has {len(header)}")
    except (csv.Error, OSError, UnicodeDecodeError, EOFError) as found:
        return UserError(f"{path}: malformed {_suffix(path)} ({found})")
    return UserError(f"{path}: malformed {_suffix(path)} ({error})")


def _check_csv_width(path: Path, delimiter: str) -> None:
    """A line with too few fields becomes nulls, which the row check reports; one with too many must not be cut."""
    explained = _explain_csv(path, delimiter, ValueError("not readable"))
    if "fields, the header has" in str(explained):
        raise explained


def read_file(path: Path) -> Dataset:
    """Reads one local file with the `datasets` builders, uncached answers to bad input included.

    Text columns stay text: `NA` is not null and `7` is not a number. Quoting is off for tsv, where a quote is a
    character like any other.

    Raises:
        UserError: The file is malformed (the line is named) or empty.
    """
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    builder = BUILDERS[_suffix(path)]
    delimiter = "\t" if _suffix(path) == "tsv" else ","
    options: dict[str, Any] = {}
    if builder == "csv":
        _check_csv_width(path, delimiter)
        options = {"sep": delimiter, "dtype": str, "keep_default_na": False}
        if delimiter == "\t":
            options["quoting"] = csv.QUOTE_NONE
    try:
        rows = datasets.load_dataset(builder, data_files={"train": str(path)}, split="train", **options)
    except Exception as error:  # the builders raise their own, Arrow's and pandas' errors
        if builder == "json":
            raise _explain_json(path, error) from error
        if builder == "csv":
            raise _explain_csv(path, delimiter, error) from error
        raise UserError(f"{path} cannot be read as parquet: {error}") from error
    return cast(Dataset, rows)


def load_split(name: str, split: str, config: str | None = None, revision: str | None = None) -> Dataset | None:
    """The rows of a split, from the Hub or from this disk; `None` if there is no such split.

    Args:
        name: Hub id, local folder or local file. A file is the split `train`.
        split: `train`, `test`, ... On the Hub also a slice such as `train[:1%]`.
        config: Configuration name on the Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: The rows cannot be had, or there are none.
    """
    if is_local(name):
        file = find_local_file(name, split)
        if file is None or (Path(name).expanduser().is_file() and split != "train"):
            return None
        rows = read_file(file)
    else:
        try:
            rows = cast(Dataset, datasets.load_dataset(name, config, split=split, revision=revision))
        except ValueError as error:
            if "nknown split" in str(error):
                return None
            raise UserError(f"the dataset {name!r} cannot be loaded: {error}") from error
        except Exception as error:  # connection, authentication and not-found errors of several libraries
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"the dataset {name!r} cannot be had from the Hub ({reason}); give a local file with "
                "--dataset_name PATH, or run `make quickstart`, which needs no Hub"
            ) from error
    if len(rows) == 0:
        raise UserError(f"{name} ({split}) has no rows")
    return rows


def check_text_columns(rows: Dataset, columns: list[str], where: str) -> None:
    """Every row must hold a string in each of these columns.

    Raises:
        UserError: Naming the file and the row, counted from 1.
    """
    for column in columns:
        for number, value in enumerate(rows[column], 1):
            if not isinstance(value, str):
                what = "is missing or null" if value is None else f"is a {type(value).__name__}, not text"
                raise UserError(f"{where} row {number}: {column!r} {what}; mend or remove the row")


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
) -> tuple[Dataset, Dataset | None]:
    """Training rows, and test rows if there are any: an own dataset, a split of the same, or a share held out.

    Raises:
        UserError: See `load_split`; also a missing training split and a hold-out that leaves nothing to train on.
    """
    train = load_split(name, train_split, config)
    if train is None:
        found = ", ".join(sorted(file.name for file in Path(name).iterdir())) if os.path.isdir(name) else "none"
        raise UserError(f"{name} has no split {train_split!r} (files: {found}); set dataset_train_split")
    if test_name is not None:
        test = load_split(test_name, test_split, config) or load_split(test_name, "train", config)
        if test is None:
            raise UserError(f"eval_dataset_name: {test_name} has neither a split {test_split!r} nor 'train'")
    else:
        test = load_split(name, test_split, config)
    if test is None and test_split_size:
        size: float = int(test_split_size) if test_split_size >= 1 else test_split_size
        if not 0 < size < len(train):
            raise UserError(f"test_split_size: {test_split_size} of {len(train)} rows leaves none to train on")
        parts = train.train_test_split(test_size=size, seed=seed)
        train, test = parts["train"], parts["test"]
    if max_train_rows is not None:
        train = train.select(range(min(max_train_rows, len(train))))
    return train, test


def hub_name(name: str) -> str | None:
    """The Hub id, for the model card; `None` for a path."""
    return None if is_local(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else name
