"""Rows from files: every kind, every split, and what is said of bad ones."""

import csv
import gzip
import io
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from plainlora.data.datasets import (
    check_text_columns,
    evenly_spaced,
    hub_name,
    is_local,
    load_split,
    load_train_and_test,
)
from plainlora.data.layouts import find_schema, split_row, template_options
from plainlora.errors import UserError

ROWS = [
    {"instruction": 'Say "hi", please.', "output": "hi"},
    {"instruction": "NA", "output": "7"},
    {"instruction": "Zeile\u2028zwei é", "output": "null"},
]
ROW = '{"instruction": "a", "output": "b"}\n'


def table(delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    quoting = {"quoting": csv.QUOTE_NONE, "quotechar": None} if delimiter == "\t" else {}
    writer = csv.writer(stream, delimiter=delimiter, **quoting)
    writer.writerow(ROWS[0])
    writer.writerows(row.values() for row in ROWS)
    return stream.getvalue().encode()


def parquet() -> bytes:
    stream = io.BytesIO()
    Dataset.from_list(ROWS).to_parquet(stream)
    return stream.getvalue()


def latin_1_parquet() -> bytes:
    stream = io.BytesIO()
    text = pyarrow.array([b"\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), stream)
    return stream.getvalue()


CONTENTS = {
    "json": lambda: json.dumps(ROWS, indent=1).encode(),
    "jsonl": lambda: "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "csv": lambda: table(","),
    "tsv": lambda: table("\t"),
    "parquet": parquet,
}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def load(name: str | Path, **options: Any) -> tuple[Dataset, Dataset | None]:
    defaults: dict[str, Any] = {
        "config": None, "train_split": "train", "test_split": "test", "test_name": None,
        "test_split_size": None, "max_train_rows": None, "seed": 42,
    }  # fmt: skip
    return load_train_and_test(str(name), **(defaults | options))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, packed: bool) -> None:
    content = CONTENTS[kind]()
    path = write(tmp_path / f"rows.{kind}{'.gz' * packed}", gzip.compress(content) if packed else content)
    train, test = load(path)
    assert train.to_list() == ROWS
    assert test is None


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv"])
def test_a_windows_file_with_byte_order_mark_reads_the_same(tmp_path: Path, kind: str) -> None:
    content = b"\xef\xbb\xbf" + CONTENTS[kind]().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert load(write(tmp_path / f"ROWS.{kind.upper()}", content))[0].to_list() == ROWS


def test_values_of_json_stay_what_they_are(tmp_path: Path) -> None:
    """The builders of `datasets` make dates of the first two, and 0.123456789 of the number."""
    messages = [{"role": "user", "content": "2024-01-01"}]
    row = {"text": "2024-01-01 12:00:00", "messages": messages, "number": 0.12345678901234}
    for name, content in (("a.jsonl", json.dumps(row)), ("a.json", json.dumps([row]))):
        rows = load_split(write(tmp_path / name, content), "train")
        assert rows is not None
        assert [*rows] == [row]


def test_values_inside_messages_and_tools_of_json_stay_what_they_are(tmp_path: Path) -> None:
    """The `Json` type of `datasets` makes 0.30000000000000004 of 0.3, and a number of the text 42."""
    call = {"function": {"name": "heat", "arguments": {"to": 0.3, "by": 1e-12, "big": 2**70, "note": None}}}
    texts = ("42", '{"a": 1}', [{"type": "text", "text": "null"}])
    asked = [{"role": "user", "content": text} for text in texts]
    written = [
        {
            "messages": [*asked, {"role": "assistant", "tool_calls": [call]}],
            "tools": [{"name": "heat", "default": 0.7}],
        },
        {"messages": [{"role": "user", "content": "a", "name": "b"}], "tools": None},
    ]
    rows = load_split(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, written))), "train")
    assert rows is not None
    assert [*rows] == written
    parts = rows.train_test_split(test_size=1, seed=0)
    assert sorted([*parts["train"], *parts["test"]], key=str) == sorted(written, key=str)
    assert [*rows["tools"]] == [row["tools"] for row in written]


def test_csv_fields_stay_text(tmp_path: Path) -> None:
    rows = load_split(write(tmp_path / "a.csv", 'a,b\nNA,7\nnull,007\n,1e5\n"x\ny",true\n'), "train")
    assert rows is not None
    assert rows.to_list() == [
        {"a": "NA", "b": "7"}, {"a": "null", "b": "007"}, {"a": "", "b": "1e5"}, {"a": "x\ny", "b": "true"},
    ]  # fmt: skip


def test_an_unbalanced_quote_in_a_tsv_does_not_swallow_the_next_row(tmp_path: Path) -> None:
    rows = load_split(write(tmp_path / "a.tsv", 'a\tb\n"hello\tx\nworld\ty"\n'), "train")
    assert rows is not None
    assert rows.to_list() == [{"a": '"hello', "b": "x"}, {"a": "world", "b": 'y"'}]


def test_blank_lines_before_a_header_line_are_none(tmp_path: Path) -> None:
    rows = load_split(write(tmp_path / "a.csv", "\n\na,b\n\n1,2\n"), "train")
    assert rows is not None
    assert rows.to_list() == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "gap"), [("csv", ","), ("tsv", "\t")])
def test_a_file_without_a_header_line_gives_every_line_as_a_row(
    tmp_path: Path, kind: str, gap: str, packed: bool
) -> None:
    content = f"ham{gap}first\n\nspam{gap}second\n".encode()
    path = write(tmp_path / f"a.{kind}{'.gz' * packed}", gzip.compress(content) if packed else content)
    rows = load_split(path, "train", columns=["label", "sms"])
    assert rows is not None
    assert rows.to_list() == [{"label": "ham", "sms": "first"}, {"label": "spam", "sms": "second"}]


def test_unbalanced_quotes_in_a_tsv_without_a_header_line_lose_no_row(tmp_path: Path) -> None:
    lines = ['ham\t"Hello', "spam\tthere", 'ham\tsay "hi" to "her', "spam\tbye"]
    rows = load_split(write(tmp_path / "a.tsv", "\n".join(lines)), "train", columns=["label", "sms"])
    assert rows is not None
    assert [f"{row['label']}\t{row['sms']}" for row in rows] == lines


NAMED = {
    "a field too many": ("a.tsv", "x\ty\n1\t2\t3\n", r"a.tsv line 2: 3 fields, but .* names 2 \(label, sms\)"),
    "a field too few": ("a.csv", "x,y\n\n1\n", r"a.csv line 3: 1 field, but dataset_columns names 2 \(label, sms\)"),
    "a first line too wide": ("a.csv", "x,y,z\n", r"a.csv line 1: 3 fields, but dataset_columns names 2"),
    "a header line": ("a.csv", "label,sms\n1,2\n", r"a.csv line 1 is a header line; leave dataset_columns out"),
    "JSON lines": ("a.jsonl", ROW, r"a.jsonl: dataset_columns is for a csv or tsv .* a jsonl file names its own"),
    "parquet": ("a.parquet", parquet(), r"a.parquet: dataset_columns is for a csv or tsv without a header line"),
}


@pytest.mark.parametrize("case", NAMED)
def test_column_names_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    name, content, message = NAMED[case]
    with pytest.raises(UserError, match=message):
        load_split(write(tmp_path / name, content), "train", columns=["label", "sms"])


def test_column_names_given_twice_or_for_the_hub_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset_columns names a column twice \(a, b, a\)"):
        load_split(write(tmp_path / "a.csv", "1,2,3\n"), "train", columns=["a", "b", "a"])
    with pytest.raises(UserError, match=r"nobody/nothing is on the Hub .*; leave dataset_columns out"):
        load_split("nobody/nothing", "train", columns=["a", "b"])


def test_a_field_longer_than_the_csv_modules_own_limit_is_read(tmp_path: Path) -> None:
    rows = load_split(write(tmp_path / "a.csv", f"a\n{'x' * 200_000}\n"), "train")
    assert rows is not None
    assert len(rows[0]["a"]) == 200_000


def test_json_columns_keep_the_files_order_and_may_be_missing(tmp_path: Path) -> None:
    rows = load_split(write(tmp_path / "a.jsonl", '{"z": "1", "a": "2"}\n\n{"a": "3", "m": 4}\n'), "train")
    assert rows is not None
    assert rows.column_names == ["z", "a", "m"]
    assert [*rows] == [{"z": "1", "a": "2", "m": None}, {"z": None, "a": "3", "m": 4}]


def test_a_column_of_no_interest_may_mix_types(tmp_path: Path) -> None:
    rows = load_split(write(tmp_path / "a.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": "x"}\n'), "train")
    assert rows is not None
    assert find_schema(rows, "text", "a.jsonl") == "text"


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW * 3)
    write(tmp_path / "test.csv", "instruction,output\na,b\n")
    write(tmp_path / "notes.txt", "not a split")
    train, test = load(tmp_path)
    assert len(train) == 3
    assert test is not None
    assert test.to_list() == [{"instruction": "a", "output": "b"}]
    assert load(tmp_path, test_split="validation")[1] is None
    assert len(load(tmp_path, train_split="test", test_split="train")[0]) == 1


def test_a_share_or_a_number_of_rows_is_held_out_by_seed(tmp_path: Path) -> None:
    numbers = [f"row {number}" for number in range(20)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in numbers))
    for size, count in ((0.25, 5), (5, 5), (0.01, 1), (19, 19), (0.55, 11)):  # 0.55 * 20 is more than 11
        train, test = load(path, test_split_size=size)
        assert test is not None
        assert len(test) == count
        assert sorted([*train["text"], *test["text"]]) == sorted(numbers)
    first, again, other = (load(path, test_split_size=0.25, seed=seed)[1] for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    assert list(first["text"]) == list(again["text"]) != list(other["text"])


def test_a_share_is_not_rounded_up_for_the_binary_fraction_that_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW * 100)
    _, test = load(path, test_split_size=0.07)  # 0.07 * 100 is a little more than 7
    assert test is not None
    assert len(test) == 7


@pytest.mark.parametrize(("count", "found"), [(2, [0, 3]), (3, [0, 2, 4]), (6, [0, 1, 2, 3, 4, 5]), (99, [*range(6)])])
def test_evenly_spaced_rows_come_from_the_whole_of_a_sorted_file(count: int, found: list[int]) -> None:
    assert list(evenly_spaced(Dataset.from_dict({"at": range(6)}), count)["at"]) == found


@pytest.mark.parametrize("size", [3, 9, 0.99, 1e30])
def test_a_hold_out_that_leaves_nothing_is_refused(tmp_path: Path, size: float) -> None:
    with pytest.raises(UserError, match=r"test_split_size: \S+ of 3 rows leaves none to train on"):
        load(write(tmp_path / "a.jsonl", ROW * 3), test_split_size=size)


def test_a_test_split_or_an_own_data_set_goes_before_a_hold_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW * 8)
    write(tmp_path / "test.jsonl", ROW * 2)
    other = write(tmp_path / "other.jsonl", ROW * 5)
    train, test = load(tmp_path, test_split_size=0.5)
    assert test is not None
    assert (len(train), len(test)) == (8, 2)
    train, test = load(tmp_path, test_name=other)
    assert test is not None
    assert (len(train), len(test)) == (8, 5)


def test_max_train_rows_takes_the_first_rows_and_leaves_the_test_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(f'{{"text": "{number}"}}\n' for number in range(10)))
    train, test = load(path, max_train_rows=3)
    assert list(train["text"]) == ["0", "1", "2"]
    train, test = load(path, max_train_rows=3, test_split_size=4)
    assert test is not None
    assert (len(train), len(test)) == (3, 4)
    assert len(load(path, max_train_rows=99)[0]) == 10


DEEP = "[" * 30_000 + "]" * 30_000
BAD = {
    "malformed JSON line": ("a.jsonl", ROW * 2 + '{"instruction": \n' + ROW, r"a.jsonl line 3: malformed JSON"),
    "malformed JSON list": ("a.json", '[{"a": 1},\n{"a":}]', r"a.json line 2: malformed JSON"),
    "JSON of one scalar": ("a.json", "5", r"line 1: a row must be an object, not int"),
    "JSON list of scalars": ("a.json", '[{"a": 1}, "x"]', r"row 2: a row must be an object, not str"),
    "JSON too deep": ("a.jsonl", ROW + f'{{"a": {DEEP}}}\n', r"line 2: malformed JSON \(too deeply nested\)"),
    "JSON beyond 64 bits": ("a.jsonl", ROW + '{"n": 1' + "0" * 30 + "}\n", r"row 2: 'n' cannot be stored"),
    "JSON of 5,000 digits": ("a.jsonl", ROW + '{"n": ' + "1" * 5000 + "}\n", r"line 2: malformed JSON \(Exc"),
    "half a surrogate pair": ("a.jsonl", ROW + '{"output": "\\ud800"}\n', r"row 2: 'output' cannot be stored"),
    "CSV with a field too many": ("a.csv", "a,b\n1,2\n1,2,3\n", r"a.csv line 3: 3 fields, the header has 2"),
    "CSV whose every line has one": ("a.csv", "a,b\n1,2,3\n4,5,6\n", r"a.csv line 2: 3 fields, the header has 2"),
    "CSV that never closes a quote": ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', r"a.csv line 3: malformed csv"),
    "CSV with a column twice": ("a.csv", "a,a\n1,2\n", r"a column name is given twice \(a, a\)"),
    "TSV with a field too many": ("a.tsv", "a\tb\n1\t2\t3\n", r"a.tsv line 2: 3 fields, the header has 2"),
    "Latin-1": ("a.csv", "a,b\n1,é\n".encode("latin-1"), r"a.csv line 2: not UTF-8 text .* save the file as UTF-8"),
    "UTF-16": ("a.jsonl", ROW.encode("utf-16"), r"a.jsonl line 1: not UTF-8 text"),
    "binary JSON": ("a.json", b"\0" * 99, r"a.json is binary, not text"),
    "binary CSV": ("a.csv", b"\0" * 99, r"a.csv is binary, not text"),
    "binary parquet": ("a.parquet", b"\x17" * 99, r"a.parquet cannot be read as parquet"),
    "parquet cut short": ("a.parquet", parquet()[:-100], r"a.parquet cannot be read as parquet"),
    "parquet of Latin-1": ("a.parquet", latin_1_parquet(), r"a.parquet cannot be read as parquet: .*UTF8"),
    "empty file": ("a.jsonl", "", r"a.jsonl is empty"),
    "blank lines only": ("a.csv", "\n\n", r"a.csv is empty"),
    "byte order mark only": ("a.csv", b"\xef\xbb\xbf", r"a.csv \(train\) has no rows"),
    "empty archive": ("a.csv.gz", b"", r"a.csv.gz is empty"),
    "archive of nothing": ("a.jsonl.gz", gzip.compress(b""), r"a.jsonl.gz is empty"),
    "no archive": ("a.jsonl.gz", ROW, r"a.jsonl.gz cannot be read: Not a gzipped file"),
    "archive cut short": ("a.jsonl.gz", gzip.compress(ROW.encode() * 99)[:30], r"Compressed file ended"),
    "no rows in a list": ("a.json", "[]", r"has no rows"),
    "no rows in a table": ("a.csv", "a,b\n", r"has no rows"),
    "another kind": ("a.txt", "hello", r"is not in a format that is read: json, jsonl, csv, tsv, parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    with pytest.raises(UserError, match=message) as raised:
        load(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(raised.value)


FIELDS = {
    "null": ('{"instruction": "a", "output": null}', r"x row 2: 'output' is missing or null"),
    "missing": ('{"instruction": "a"}', r"x row 2: 'output' is missing or null"),
    "a number": ('{"instruction": 5, "output": "b"}', r"x row 2: 'instruction' is of type int, not text"),
    "a list": ('{"instruction": "a", "output": ["b"]}', r"x row 2: 'output' is of type list, not text"),
    "a numeric input": ('{"instruction": "a", "input": 5, "output": "b"}', r"row 2: 'input' is of type int, not text"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_row_with_a_bad_field_is_named(tmp_path: Path, case: str) -> None:
    row, message = FIELDS[case]
    rows, _ = load(write(tmp_path / "a.jsonl", ROW + row + "\n"))
    with pytest.raises(UserError, match=message):
        find_schema(rows, "text", "x")


def test_an_input_may_be_missing_from_some_rows(tmp_path: Path) -> None:
    rows, _ = load(write(tmp_path / "a.jsonl", ROW + '{"instruction": "a", "input": "i", "output": "b"}\n'))
    assert find_schema(rows, "text", "x") == "instruction"
    assert [split_row(row, "instruction")[0][0]["content"] for row in rows] == ["a", "a\n\n### Input:\ni"]


def test_a_short_line_of_a_csv_is_a_missing_field(tmp_path: Path) -> None:
    rows, _ = load(write(tmp_path / "a.csv", "instruction,output\na,b\n\nc\n"))
    with pytest.raises(UserError, match="x row 2: 'output' is missing or null"):
        check_text_columns(rows, ["instruction", "output"], "x")


def test_without_a_known_column_the_columns_are_listed(tmp_path: Path) -> None:
    rows, _ = load(write(tmp_path / "a.csv", "question,answer\na,b\n"))
    with pytest.raises(
        UserError, match=r"x has the columns question, answer; needed are .* 'text' .*dataset_text_field"
    ):
        find_schema(rows, "text", "x")


def test_a_missing_file_or_split_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*nope.jsonl; give a Hub id, a folder, or a json"):
        load(tmp_path / "nope.jsonl")
    with pytest.raises(UserError, match=r"has no split 'train' \(it holds no files\)"):
        load(tmp_path)
    path = write(tmp_path / "test.jsonl", ROW)
    with pytest.raises(UserError, match=r"has no split 'train' \(it holds test.jsonl\); set dataset_train_split"):
        load(tmp_path)
    with pytest.raises(UserError, match="is the split 'train', not 'validation'"):
        load(path, train_split="validation")
    with pytest.raises(UserError, match=r"there is no file .*gone.csv"):
        load(path, test_name=str(tmp_path / "gone.csv"))


@pytest.mark.parametrize(
    ("split", "advice"),
    [
        ("train[:10]", r"\('train\[:10\]'\); name the split 'train', .* --max_train_rows 10$"),
        ("train[5%:]", r"\('train\[5%:\]'\); name the split 'train', .* --max_train_rows N$"),
    ],
)
def test_a_slice_of_a_local_split_names_the_flag_that_does_it(tmp_path: Path, split: str, advice: str) -> None:
    path = write(tmp_path / "train.jsonl", ROW * 20)
    for name in (path, tmp_path):
        with pytest.raises(UserError, match=advice):
            load(name, train_split=split)


@pytest.mark.parametrize(
    "name", ["x" * 5000 + ".csv", "a\0b.csv", "~nobody_here/x.csv", "/dev/null/x.csv", "./" + "d/" * 3000]
)
def test_a_name_that_no_disk_can_hold_is_no_file(name: str) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load(name)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "train.json"):
        write(tmp_path / name, "[]")
    with pytest.raises(UserError, match=r"holds several files for train: train.csv, train.json; keep one"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_an_unreachable_hub_id_names_the_ways_out(name: str) -> None:
    with pytest.raises(
        UserError, match=f"{name}' cannot be loaded from the Hub .*--dataset_name PATH.*make quickstart"
    ):
        load(name)


def test_a_path_is_told_from_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here.jsonl", ROW)
    for name in ("./x", "/x/y", "~/x", "x.jsonl", "data/x.csv.gz", "here.jsonl"):
        assert is_local(name)
        assert hub_name(name) is None
    assert not is_local("vicgalle/alpaca-gpt4")
    assert hub_name("vicgalle/alpaca-gpt4") == "vicgalle/alpaca-gpt4"


def test_a_path_may_hold_characters_that_mean_something_to_a_shell_or_a_url(tmp_path: Path) -> None:
    for name in ("a [1]*.jsonl", "a::b.jsonl", "a?.jsonl"):
        assert len(load(write(tmp_path / name, ROW))[0]) == 1


def test_nulls_that_parquet_puts_in_place_of_missing_fields_are_not_read(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Ghent"}}}
    other = {"function": {"name": "clock", "arguments": {"zone": "Oslo"}}}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [one]}], "tools": tools}
        for one, tools in ((call, [{"name": "weather", "city": "text"}]), (other, [{"name": "clock"}]), (call, None))
    ]
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist()[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "city": None,
        "zone": "Oslo",
    }
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    read, test = load_train_and_test(
        str(tmp_path), config=None, train_split="train", test_split="test", test_name=None, test_split_size=1,
        max_train_rows=None, seed=0,
    )  # fmt: skip
    assert test is not None
    found = [[*chain(*split_row(row, "messages")), template_options(row)] for row in [*read, *test]]
    expected = [[*row["messages"], {"tools": row["tools"]}] for row in rows]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_nulls_that_a_json_file_holds_are_kept(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": None}}}
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    read = load_split(str(tmp_path / "rows.jsonl"), "train")
    assert read is not None
    assert read[0] == row


def test_rows_are_checked_before_any_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(UserError, match="has the columns question; needed are"):
        load_train_and_test(
            str(tmp_path / "rows.jsonl"), config=None, train_split="train", test_split="test", test_name=None,
            test_split_size=5, max_train_rows=None, seed=0, check=lambda rows, where: find_schema(rows, "text", where),
        )  # fmt: skip


def test_the_training_rows_are_not_the_test_rows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", ROW * 10)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"eval_dataset_name: rows.jsonl holds the training rows; give other rows"):
        load(path, test_name="rows.jsonl")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "test.jsonl", ROW * 10)
    assert load(tmp_path / "folder", train_split="test")[1] is None
    train, test = load(tmp_path / "folder", train_split="test", test_split_size=2)
    assert (len(train), len(test or ())) == (8, 2)
