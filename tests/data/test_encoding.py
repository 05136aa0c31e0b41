"""Token ids, labels, and a count of everything that is left out."""

import copy
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from plainlora.data.datasets import load_train_and_test
from plainlora.data.encoding import IGNORED, EncodingReport, encode_rows
from plainlora.data.prompts import assistant_message, install_template, render, render_prompt, user_message
from plainlora.errors import UserError
from tests.conftest import ROWS, make_model

CHAT = [
    {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Another."}, {"role": "assistant", "content": "Blue."},
]  # fmt: skip
TEXTS = [
    {"prompt": "Name a colour.", "completion": " Red."},
    {"prompt": " It i", "completion": "s here. \n"},  # the boundary merges; nothing is stripped
    {"prompt": "Stop.\n", "completion": "It is.<|endoftext|>"},
    {"prompt": "", "completion": "It is."},
]
WITHOUT_EOS = "{% for m in messages %}{{ m.content }}{% endfor %}"
WITHOUT_MARKERS = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def alpaca(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tokenizer)
    install_template(own, "alpaca")
    return own


def encode(
    rows: list[dict[str, Any]] | Dataset, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> tuple[Dataset, EncodingReport]:
    defaults: dict[str, Any] = {
        "where": "rows.jsonl", "text_column": "text", "answers_only": False, "max_length": None,
        "on_overflow": "drop", "max_truncated": 0.0,
    }  # fmt: skip
    given = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    encoded, report = encode_rows(given, tokenizer, **(defaults | options))
    report.check()
    return encoded, report


def ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def trained(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def test_by_default_every_token_is_trained(alpaca: PreTrainedTokenizerFast) -> None:
    encoded, report = encode(ROWS, alpaca)
    assert encoded.column_names == ["input_ids", "labels"]
    assert encoded["input_ids"] == encoded["labels"]
    assert report.kept == report.rows == len(ROWS)
    assert report.trained_tokens == report.tokens - report.kept  # the first of a row is not predicted


def test_answers_only_trains_exactly_the_answer_and_its_eos(alpaca: PreTrainedTokenizerFast) -> None:
    encoded, report = encode(ROWS, alpaca, answers_only=True)
    for row, source in zip(encoded, ROWS, strict=True):
        answer = ids(source["output"] + alpaca.eos_token, alpaca)
        prompt = ids(render_prompt(source["instruction"], alpaca, source["input"]), alpaca)
        assert row["labels"] == [IGNORED] * len(prompt) + answer
        assert row["input_ids"] == prompt + answer
    assert report.trained_tokens == sum(len(ids(row["output"], alpaca)) + 1 for row in ROWS)


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|pad|>"])
def test_u04_every_row_trains_an_eos_whatever_the_pad_token_is(
    alpaca: PreTrainedTokenizerFast, pad: str, answers_only: bool
) -> None:
    alpaca.pad_token = pad
    rows = [{"messages": CHAT}], ROWS, [{"prompt": "a", "completion": "b"}]
    for schema in rows:
        encoded, report = encode(schema, alpaca, answers_only=answers_only)
        assert report.kept == len(schema)
        assert all(row["labels"][-1] == alpaca.eos_token_id for row in encoded)


@pytest.mark.parametrize("text", ["Plain text.", "Plain text.<|endoftext|>"])
def test_u04_plain_text_ends_in_one_eos(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    (row,), _ = encode([{"text": text}], tokenizer)
    assert row["input_ids"] == row["labels"] == [*ids("Plain text.", tokenizer), tokenizer.eos_token_id]


def test_an_empty_text_is_dropped_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded, report = encode([{"text": ""}, {"text": "Some words."}], tokenizer)
    assert (len(encoded), report.kept, report.untrained) == (1, 1, 1)
    assert "1 without a trained token dropped" in report.line("train")


def lengths(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [len(row) for row in encode(ROWS, tokenizer)[0]["input_ids"]]


def test_u05_long_rows_are_dropped_whole_and_counted(alpaca: PreTrainedTokenizerFast) -> None:
    before = lengths(alpaca)
    limit = int(statistics.median(before))
    encoded, report = encode(ROWS, alpaca, max_length=limit, max_truncated=1.0)
    kept = [length for length in before if length <= limit]
    assert [len(row["input_ids"]) for row in encoded] == kept
    assert 0 < len(kept) < len(ROWS)
    assert report == EncodingReport(
        where="rows.jsonl", max_length=limit, on_overflow="drop", max_truncated=1.0, eos_token="<|endoftext|>",
        rows=len(ROWS), kept=len(kept), too_long=len(ROWS) - len(kept), eos_cut_off=0, empty_answers=0,
        answers_cut_off=0, untrained=0, without_eos=0, first_without_eos=None, merged_boundaries=0, first_merged=None,
        longest=max(before),
        median=statistics.median(before), percentile_95=sorted(before)[37], tokens=sum(kept),
        trained_tokens=sum(kept) - len(kept),
        largest_id=max(max(row) for row in encode(ROWS, alpaca)[0]["input_ids"]),
    )  # fmt: skip
    assert f"{len(ROWS) - len(kept)} longer than max_length dropped" in report.line("train rows")


@pytest.mark.parametrize("keep_end", [False, True])
def test_u05_long_rows_are_truncated_at_the_chosen_end(alpaca: PreTrainedTokenizerFast, keep_end: bool) -> None:
    whole, _ = encode(ROWS, alpaca)
    cut, report = encode(ROWS, alpaca, max_length=50, max_truncated=1.0, on_overflow="truncate", keep_end=keep_end)
    for row, full in zip(cut, whole, strict=True):
        assert row["input_ids"] == row["labels"]
        assert row["input_ids"] == (full["input_ids"][-50:] if keep_end else full["input_ids"][:50])
    assert (report.kept, report.too_long, report.tokens) == (len(ROWS), len(ROWS), 50 * len(ROWS))
    assert "40 longer than max_length truncated" in report.line("train rows")
    assert report.eos_cut_off == (0 if keep_end else len(ROWS))
    assert ("40 of them trained without their EOS" in report.line("train rows")) == (not keep_end)


def test_u05_too_many_long_rows_are_an_error_that_names_the_counts(alpaca: PreTrainedTokenizerFast) -> None:
    before = lengths(alpaca)
    limit = sorted(set(before))[-2]
    long = sum(length > limit for length in before)
    assert 0 < long < 40
    with pytest.raises(
        UserError, match=rf"{long} of 40 rows are longer than max_length={limit} .*longest {max(before)}"
    ):
        encode(ROWS, alpaca, max_length=limit, max_truncated=(long - 0.5) / 40)
    assert encode(ROWS, alpaca, max_length=limit, max_truncated=long / 40)[1].too_long == long


def test_u05_the_share_that_the_error_suggests_is_enough(alpaca: PreTrainedTokenizerFast) -> None:
    limit = sorted(set(lengths(alpaca)))[-2]
    with pytest.raises(UserError, match="--max_truncated") as raised:
        encode(ROWS, alpaca, max_length=limit)
    encode(ROWS, alpaca, max_length=limit, max_truncated=float(str(raised.value).split()[-1]))


@pytest.mark.parametrize(("long", "rows"), [(29, 100), (3, 7), (57, 100), (1, 3)])
def test_u05_the_share_suggested_is_enough_for_any_counts(
    alpaca: PreTrainedTokenizerFast, long: int, rows: int
) -> None:
    _, report = encode(ROWS, alpaca)
    too_many = dataclasses.replace(report, rows=rows, too_long=long, kept=rows - long)
    advised = float(too_many.faults()["truncated"].split()[-1])
    assert dataclasses.replace(too_many, max_truncated=advised).faults() == {}
    assert "truncated" in dataclasses.replace(too_many, max_truncated=advised - 0.01).faults()
    none_left = dataclasses.replace(too_many, too_long=rows, kept=0)
    assert none_left.faults()["truncated"].endswith("; raise max_length")  # to accept it would leave nothing


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "output": " "},
        {"prompt": "a", "completion": ""},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n"}]},
    ],
)
def test_empty_answers_are_counted_and_nothing_else_is_an_error(
    alpaca: PreTrainedTokenizerFast, row: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="no row has an answer, so the model would learn to answer nothing"):
        encode([row], alpaca)
    assert encode(ROWS[:3], alpaca)[1].empty_answers == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "a", "messages": CHAT}, "the column 'image' needs a vision model"),
        ({"data": [{"instruction": "a", "output": "b"}]}, "is one object that holds a list, 'data'"),
    ],
)
def test_other_layouts_are_named(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        encode([row], tokenizer)


def test_u05_a_row_whose_answer_is_cut_off_is_dropped_and_counted(alpaca: PreTrainedTokenizerFast) -> None:
    short, long = {"instruction": "a", "output": "b"}, {"instruction": "word " * 30, "output": "b"}
    limit = len(encode([short], alpaca)[0][0]["input_ids"])
    encoded, report = encode(
        [short, long], alpaca, answers_only=True, max_length=limit, max_truncated=0.5, on_overflow="truncate"
    )
    assert (len(encoded), report.kept, report.too_long, report.answers_cut_off) == (1, 1, 1, 1)
    assert (report.untrained, report.eos_cut_off) == (0, 0)
    assert "1 of them without their answer, dropped" in report.line("train rows")
    with pytest.raises(UserError, match="no row is left with a token to train on; raise max_length"):
        encode([long], alpaca, answers_only=True, max_length=limit, max_truncated=1.0, on_overflow="truncate")


def test_a_conversation_trains_every_turn_of_the_assistant(alpaca: PreTrainedTokenizerFast) -> None:
    (row,), _ = encode([{"messages": CHAT}], alpaca, answers_only=True)
    assert row["input_ids"] == ids(render(CHAT, alpaca), alpaca)
    assert trained(row, alpaca) == "Red.<|endoftext|>Blue.<|endoftext|>"
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_prompt_and_completion_as_messages_are_rendered(alpaca: PreTrainedTokenizerFast) -> None:
    (row,), _ = encode([{"prompt": CHAT[:1], "completion": CHAT[1:2]}], alpaca, answers_only=True)
    assert alpaca.decode(row["input_ids"]) == render(CHAT[:2], alpaca)
    assert trained(row, alpaca) == "Red.<|endoftext|>"


@pytest.mark.parametrize("completion", [" Red. ", " Red. <|endoftext|>"])
def test_prompt_and_completion_as_texts_are_joined_as_they_are(
    alpaca: PreTrainedTokenizerFast, completion: str
) -> None:
    (row,), _ = encode([{"prompt": " A colour: ", "completion": completion}], alpaca, answers_only=True)
    assert alpaca.decode(row["input_ids"]) == " A colour:  Red. <|endoftext|>"
    assert trained(row, alpaca).endswith("Red. <|endoftext|>")
    assert "colour" not in trained(row, alpaca)


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a BOS that it puts before every text, as Llama's."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"bos_token": "<s>"})
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
    )
    return own


COMPARED: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "instruction": (
        ROWS,
        [
            {
                "prompt": [user_message(row["instruction"], row["input"])],
                "completion": [assistant_message(row["output"])],
            }
            for row in ROWS
        ],
    ),
    "texts": (TEXTS, TEXTS),
    "messages": ([{"messages": CHAT}], [{"messages": CHAT}]),
    "text": ([{"text": "Plain."}, {"text": "More.<|endoftext|>"}], [{"text": "Plain."}, {"text": "More."}]),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("schema", "answers_only"),
    [*((schema, False) for schema in COMPARED), *((s, True) for s in COMPARED if s != "text")],
)
def test_ids_and_labels_are_those_of_trl(
    schema: str, answers_only: bool, bos: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own = with_bos(tokenizer) if bos else copy.deepcopy(tokenizer)
    install_template(own, "alpaca")
    rows, as_trl_reads_them = COMPARED[schema]
    chat = schema == "messages"
    args = SFTConfig(
        output_dir=str(tmp_path), max_length=None, completion_only_loss=answers_only and not chat,
        assistant_only_loss=answers_only and chat, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False,
    )  # fmt: skip
    model = make_model("llama")
    model.resize_token_embeddings(len(own))
    theirs = SFTTrainer(model, args, train_dataset=Dataset.from_list(as_trl_reads_them), processing_class=own)
    ours, _ = encode(rows, own, answers_only=answers_only)
    assert len(ours) == len(rows)
    for column in ("input_ids", "labels"):
        assert list(ours[column]) == list(theirs.train_dataset[column])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": None}, "'messages' must be a list of messages, not null"),
        ({"messages": "hello"}, "'messages' must be a list of messages, not str; give a json, jsonl or"),
        ({"messages": 5}, "'messages' must be a list of messages, not int"),
        ({"messages": []}, "'messages' must be a list of messages, not empty"),
        ({"messages": ["hello"]}, "a message needs a role and a content, both text .*, not 'hello'"),
        ({"messages": [{"role": "user", "content": 5}]}, "a message needs a role and a content, both text"),
        ({"messages": [{"role": 5, "content": "a"}]}, "a message needs a role and a content, both text"),
        ({"messages": [{"role": "assistant"}]}, "a message needs a content or tool_calls beside its role"),
        ({"messages": [{"role": "assistant", "tool_calls": "[{}]"}]}, "'tool_calls' must be a list of calls, each an"),
        ({"messages": CHAT, "tools": "[{"}, "'tools' is text, but not JSON"),
        ({"messages": CHAT, "tools": {"name": "a"}}, "'tools' must be a list of JSON schemas of functions"),
        ({"messages": CHAT, "tools": ["a"]}, "'tools' must be a list of JSON schemas of functions"),
        ({"messages": CHAT, "chat_template_kwargs": "a"}, "'chat_template_kwargs' must be an object, not str"),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "sets 'tokenize', which is not a variable"),
        ({"messages": [{"role": "system", "content": "a"}, *CHAT]}, "roles user and assistant, not system"),
        ({"prompt": "a", "completion": None}, "two texts or two lists of messages, not str and null"),
        ({"prompt": 5, "completion": 6}, "two texts or two lists of messages, not int and int"),
        ({"prompt": "a", "completion": CHAT[1:2]}, "two texts or two lists of messages, not str and list"),
    ],
)
def test_a_bad_conversation_names_its_row(alpaca: PreTrainedTokenizerFast, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        encode([row], alpaca)
    assert str(raised.value).startswith("rows.jsonl row 1: ")


def test_a_template_that_does_not_end_answers_with_eos_is_refused(alpaca: PreTrainedTokenizerFast) -> None:
    alpaca.chat_template = WITHOUT_EOS
    with pytest.raises(UserError, match=r"does not end answers with the tokenizer's EOS '<\|endoftext\|>'"):
        encode(ROWS, alpaca)
    alpaca.chat_template = WITHOUT_MARKERS
    assert encode(ROWS, alpaca)[1].kept == len(ROWS)


def test_a_tokenizer_without_eos_is_refused(alpaca: PreTrainedTokenizerFast) -> None:
    alpaca.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        encode(ROWS, alpaca)


def test_plain_text_has_no_answers_to_train_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="completion_only_loss needs rows that tell the answer from the prompt"):
        encode([{"text": "a"}], tokenizer, answers_only=True)


def test_u06_a_prompt_that_merges_with_its_answer_is_counted(alpaca: PreTrainedTokenizerFast) -> None:
    alpaca.chat_template = WITHOUT_MARKERS
    merging = {"instruction": "It i", "output": "s here."}
    assert len(ids("It is", alpaca)) < len(ids("It i", alpaca)) + len(ids("s", alpaca))
    encoded, report = encode([merging, {"instruction": "a", "output": ". b"}], alpaca, answers_only=True)
    assert (report.merged_boundaries, report.first_merged) == (1, 1)
    assert "1 that do not begin with the tokens of their prompt" in report.line("train")
    assert trained(encoded[0], alpaca).endswith("s here.<|endoftext|>")


def test_an_input_is_rendered_as_in_generation(alpaca: PreTrainedTokenizerFast) -> None:
    (row,), _ = encode([{"instruction": "a", "input": "b", "output": "c"}], alpaca)
    prompt = render([user_message("a", "b")], alpaca, for_generation=True)
    assert alpaca.decode(row["input_ids"]) == prompt + "c<|endoftext|>"


def test_a_row_keeps_its_number_when_a_test_set_is_held_out(alpaca: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"messages": [user_message(f"Say {number}."), assistant_message("Yes.")]} for number in range(40)]
    rows[4]["messages"][0]["rolle"] = rows[4]["messages"][0].pop("role")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for seed in range(3):
        split = {"config": None, "train_split": "train", "test_split": "test", "test_name": None}
        train, test = load_train_and_test(
            str(tmp_path / "rows.jsonl"), **split, test_split_size=8, max_train_rows=None, seed=seed
        )
        said = ""
        for part in (train, test):
            assert part is not None
            try:
                encode(part, alpaca, answers_only=True)
            except UserError as error:
                said += str(error)
        assert said.startswith("rows.jsonl row 5: a message needs a role")
