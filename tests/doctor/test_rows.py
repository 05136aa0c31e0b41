"""Every fault that rows of a language model can have is planted and found, and healthy rows have none."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import ModelConfig, ScriptArguments

from plainlora.data.prompts import install_template, render, render_prompt
from plainlora.doctor import tokens
from plainlora.doctor.finding import Examination, Finding
from plainlora.doctor.rows import examine_rows
from plainlora.errors import UserError
from plainlora.settings.arguments import SFTArguments, SFTRecipeConfig
from plainlora.settings.programs import Settings
from plainlora.tasks.rows import PreparedRows, prepare_rows
from tests.conftest import CONFIGS, ROWS

WITHOUT_EOS = "{% for m in messages %}{{ m.content }}{% endfor %}"
WITHOUT_MARK = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer to change, with the Alpaca template."""
    copied = copy.deepcopy(tokenizer)
    install_template(copied, "alpaca")
    return copied


def prepare(
    folder: Path, tokenizer: PreTrainedTokenizerFast, train: list[Any], test: list[Any] | None = None, **settings: Any
) -> PreparedRows:
    for name, rows in (("train", train), ("test", test)):
        if rows is not None:
            content = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    names = ("on_overflow", "max_truncated", "exact_match_rows", "eval_dataset_name")
    recipe = {key: settings.pop(key) for key in names if key in settings}
    training = SFTRecipeConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", **settings)
    script = ScriptArguments(dataset_name=str(folder))
    settings_of_run = Settings(SFTArguments(**recipe), script, training, ModelConfig())
    return prepare_rows(settings_of_run, tokenizer, lambda _: None)


def examine(rows: PreparedRows, tokenizer: PreTrainedTokenizerFast) -> Examination:
    return examine_rows(rows, tokenizer, CONFIGS["llama"]())


def found(examination: Examination, check: str, subject: str = "train rows") -> Finding:
    """The one finding of a check."""
    (finding,) = [one for one in examination.findings if (one.check, one.subject) == (check, subject)]
    return finding


@pytest.mark.parametrize("answers_only", [False, True])
def test_healthy_rows_have_no_warning_and_no_error(
    own: PreTrainedTokenizerFast, tmp_path: Path, answers_only: bool
) -> None:
    rows = prepare(tmp_path, own, ROWS[:30], ROWS[30:], completion_only_loss=answers_only)
    examination = examine(rows, own)
    assert {finding.level for finding in examination.findings} == {"ok"}
    assert len(examination.findings) == 11
    assert examination.summary() == "doctor: 11 checks, nothing wrong"
    said: list[str] = []
    examination.stop_or_log(said.append)
    assert said == [examination.summary()]


def test_u04_a_template_without_eos_is_an_error(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own.chat_template = WITHOUT_EOS
    rows = prepare(tmp_path, own, ROWS)
    assert rows.reports["train"].without_eos == len(ROWS)
    examination = examine(rows, own)
    finding = found(examination, "eos")
    assert finding.level == "error"
    assert "train) row 1: the chat template does not end answers with the tokenizer's EOS" in finding.message
    with pytest.raises(UserError, match="does not end answers"):
        examination.stop_or_log(print)


def test_u04_eos_as_pad_is_noted_and_eos_is_trained(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own.pad_token = own.eos_token
    rows = prepare(tmp_path, own, ROWS, completion_only_loss=True)
    examination = examine(rows, own)
    assert found(examination, "pad", "tokenizer").level == "note"
    assert found(examination, "eos").level == "ok"
    assert all(row["labels"][-1] == own.eos_token_id for row in rows.train)


def test_u04_a_collator_that_masks_the_pad_token_is_found(
    own: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' collator for language models does so: llm-course#33."""
    own.pad_token = own.eos_token

    def masking(pad_token_id: int) -> Any:
        collate = transformers.DataCollatorForLanguageModeling(own, mlm=False)
        return lambda rows: collate([{"input_ids": row["input_ids"]} for row in rows])

    monkeypatch.setattr(tokens, "DataCollatorForLanguageModeling", masking)
    finding = found(examine(prepare(tmp_path, own, ROWS), own), "pad", "tokenizer")
    assert finding.level == "error"
    assert "changes the labels of a batch" in finding.message


def test_u05_too_many_long_rows_are_an_error_and_few_are_counted(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    long = {"instruction": "word " * 120, "output": "b"}
    rows = prepare(tmp_path, own, [*ROWS, long], max_length=200)
    finding = found(examine(rows, own), "truncated")
    assert finding.level == "error"
    assert "1 of 41 rows are longer than max_length=200" in finding.message
    rows = prepare(tmp_path, own, [*ROWS, long], max_length=200, max_truncated=0.05)
    finding = found(examine(rows, own), "truncated")
    assert (finding.level, finding.figures["too_long"]) == ("note", 1)
    assert finding.message.endswith("and dropped")


@pytest.mark.filterwarnings("ignore:.*keep_end")  # TRL's own deprecation
def test_u05_truncation_that_eats_eos_or_the_answer_is_a_warning(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    long_answer = {"instruction": "a", "output": "word " * 120}
    long_prompt = {"instruction": "word " * 120, "output": "b"}
    settings = {"max_length": 200, "max_truncated": 0.5, "on_overflow": "truncate", "completion_only_loss": True}
    rows = prepare(tmp_path, own, [*ROWS, long_answer, long_prompt], **settings)
    assert own.eos_token_id not in rows.train[-1]["labels"]
    assert (rows.reports["train"].eos_cut_off, rows.reports["train"].answers_cut_off) == (1, 1)
    finding = found(examine(rows, own), "cut off")
    assert finding.level == "warning"
    assert "1 are trained without their EOS and 1 lose their whole answer" in finding.message
    rows = prepare(tmp_path, own, [*ROWS, long_answer], truncation_mode="keep_end", **settings)
    assert rows.reports["train"].eos_cut_off == 0


def test_u05_rows_without_a_trained_token_are_a_warning_and_none_left_an_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = prepare(tmp_path, tokenizer, [{"text": ""}, {"text": "Some words."}])
    finding = found(examine(rows, tokenizer), "untrained")
    assert (finding.level, finding.figures["untrained"]) == ("warning", 1)
    rows = prepare(tmp_path, tokenizer, [{"text": ""}])
    finding = found(examine(rows, tokenizer), "left")
    assert finding.level == "error"
    assert "no row is left with a token to train on" in finding.message


def test_u06_a_prompt_that_merges_with_its_answer_is_a_warning(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own.chat_template = WITHOUT_MARK
    merging = {"instruction": "It i", "output": "s here."}
    finding = found(
        examine(prepare(tmp_path, own, [{"instruction": "a", "output": ". b"}, merging]), own), "prompt is prefix"
    )
    assert (finding.level, finding.figures["merged"]) == ("warning", 1)
    assert "(first in row 2)" in finding.message


class _Shouting(PreTrainedTokenizerFast):
    """A tokenizer whose own code renders: what is saved renders by the template alone."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return str(super().apply_chat_template(*args, **kwargs)).upper()


def test_u06_a_template_that_is_not_saved_is_an_error(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = prepare(tmp_path, own, ROWS)
    assert found(examine(rows, own), "saved", "tokenizer").level == "ok"
    shouting = _Shouting(
        tokenizer_object=own.backend_tokenizer, eos_token=own.eos_token, pad_token=own.pad_token,
        chat_template=own.chat_template, model_max_length=256,
    )  # fmt: skip
    finding = found(examine(rows, shouting), "saved", "tokenizer")
    assert finding.level == "error"
    assert "it differs in its template" in finding.message


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([{"instruction": " a ", "input": "x", "output": "b"}], [{"instruction": "a", "input": "x ", "output": "c"}]),
        ([{"prompt": "a", "completion": "b"}], [{"prompt": "a", "completion": "c"}]),
        ([{"text": "a b "}], [{"text": "a b"}]),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}],
        ),
    ],
)
def test_a_test_row_that_asks_what_a_training_row_asks_is_a_warning(
    own: PreTrainedTokenizerFast, tmp_path: Path, train: list[Any], test: list[Any]
) -> None:
    examination = examine(prepare(tmp_path, own, [*train, *train], test), own)
    finding = found(examination, "leaked", "test rows")
    assert (finding.level, finding.figures["leaked"]) == ("warning", 1)
    assert found(examination, "repeated").figures["repeated"] == 1


def test_rows_that_an_evaluation_needs_and_are_not_there(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    finding = found(examine(prepare(tmp_path, own, ROWS, exact_match_rows=3), own), "missing", "test rows")
    assert finding.level == "error"
    assert "need test rows: set test_split_size or eval_dataset_name" in finding.message


@pytest.mark.parametrize(
    ("row", "said"),
    [({"question": "a"}, "has the columns question"), ({"text": "a"}, "assistant_only_loss needs rows")],
)
def test_what_is_wrong_with_test_rows_names_their_own_file(
    own: PreTrainedTokenizerFast, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match=said) as caught:
        prepare(tmp_path, own, ROWS, eval_dataset_name=str(other), assistant_only_loss=True)
    assert str(caught.value).startswith(f"{other} (test)")


def test_a_token_that_the_base_does_not_know_is_an_error(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own.add_tokens(["instruct"])
    finding = found(examine(prepare(tmp_path, own, ROWS), own), "token ids")
    assert finding.level == "error"
    assert "token id 320 has no embedding among the base's 320" in finding.message


def chat(*said: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said], **fields}


USER = {"role": "user", "content": "a"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ghent"}}}
TURN = (("user", "Name a colour."), ("assistant", "Red."))
CHATML = (
    "{% for m in messages %}{{ m.role + ':' + (m.content or '') }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% elif m.role == 'assistant' %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("row", "template", "check", "level", "said"),
    [
        (chat(("system", "Be brief."), *TURN), NO_SYSTEM, "message", "warning", "leaves out the system message"),
        (chat(("human", "a"), ("gpt", "b")), CHATML, "roles", "warning", "no message is the assistant's"),
        (chat(*TURN, tools=[{"function": {"name": "weather"}}]), CHATML, "tools", "warning", "leaves out the tools"),
        (chat(*TURN, chat_template_kwargs={"mood": 1}), CHATML, "template options", "warning", "not read 'mood'"),
        (
            {"messages": [USER, {"role": "assistant", "content": "b", "tool_calls": [CALL]}]},
            CHATML, "tool call", "warning", "leaves out the assistant's tool call",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "b", "thinking": "c"}]},
            CHATML, "message", "warning", "leaves out the assistant's thinking",
        ),
        (
            {"messages": [USER | {"weight": 0}, {"role": "assistant", "content": "b"}]},
            CHATML, "fields", "note", "does not read the messages' field 'weight'",
        ),
        (
            chat(("user", "a"), ("assistant", "<think>c</think>b")),
            CHATML.replace("(m.content or '')", "m.content.split('</think>')[-1]"),
            "thinking", "note", "strips the assistant's thinking",
        ),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_named_with_its_row(
    own: PreTrainedTokenizerFast, tmp_path: Path, row: dict[str, Any], template: str, check: str, level: str, said: str
) -> None:
    own.chat_template = template
    examination = examine(prepare(tmp_path, own, [chat(*TURN), row, row]), own)
    finding = found(examination, check)
    assert (finding.level, finding.figures) == (level, {"rows": 2, "first": 2})
    assert said in finding.message
    assert "in 2 of 3" in finding.message
    assert "(first in row 2)" in finding.message
    whole = examine(prepare(tmp_path, own, [chat(*TURN), chat(*TURN)]), own)
    assert {one.level for one in whole.findings if one.check != "repeated"} == {"ok"}


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "reasoning_content": "It is warm."},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "gpt", "content": "Red."},
    ],
)
def test_an_answer_that_vanishes_is_an_error_with_its_row(
    own: PreTrainedTokenizerFast, tmp_path: Path, answer: dict[str, Any]
) -> None:
    own.chat_template = NO_SYSTEM.replace("m.content +", "(m.content or '') +")
    rows = prepare(tmp_path, own, [chat(*TURN), {"messages": [{"role": "user", "content": "Call."}, answer]}])
    finding = found(examine(rows, own), "answer")
    assert finding.level == "error"
    assert f"(train) row 2: the chat template leaves out the {answer['role']}'s" in finding.message
    assert "so an empty answer would be trained (1 of 2 rows)" in finding.message
    assert ("name the roles user and assistant" in finding.message) == (answer["role"] == "gpt")
    with pytest.raises(UserError, match="leaves out"):  # before what follows from it: here, that it has no EOS
        rows.reports["train"].check()


def test_arguments_that_the_template_quotes_once_more_are_a_warning(
    own: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own.chat_template = (
        "{% for m in messages %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}{% endfor %}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    rows: list[dict[str, Any]] = []
    for arguments in ({"city": "Ghent"}, '{"city": "Ghent"}'):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        rows.append({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    prepared = prepare(tmp_path, own, rows)
    assert r'"{\"city\": \"Ghent\"}"' in own.decode(prepared.train[1]["input_ids"])
    finding = found(examine(prepared, own), "quoted")
    assert (finding.level, finding.figures) == ("warning", {"rows": 1, "first": 2})


def test_columns_that_nothing_reads_are_one_note(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = prepare(tmp_path, own, [{"id": 1, **row, "source": "here"} for row in ROWS])
    finding = found(examine(rows, own), "columns")
    assert (finding.level, finding.figures) == ("note", {"unread": ["id", "source"]})
    texts = prepare(tmp_path, own, [{"text": "a", "tools": []}])
    assert found(examine(texts, own), "columns").figures == {"unread": ["tools"]}


def test_u06_prompts_begin_as_the_rows_of_text_did(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    install_template(own, "llama2")
    texts = [{"text": f"<s>[INST] Say {number}. [/INST] {number} </s>"} for number in range(4)]
    rows = prepare(tmp_path, own, texts)
    examination = examine(rows, own)
    finding = found(examination, "foreign token")
    assert (finding.level, finding.figures["rows"]) == ("warning", 4)
    assert "begin with <s> (first in row 1), which is not a token of this tokenizer" in finding.message
    own.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for number, row in enumerate(rows.train):
        prompt = again(render_prompt(f"Say {number}.", again), add_special_tokens=False).input_ids
        assert row["input_ids"][: len(prompt)] == prompt
    assert "beginning" not in {one.check for one in examination.findings}


def test_u06_what_all_rows_begin_with_is_said_at_inference_too_whatever_its_letters(
    own: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    lead = "Friendly bot \U0001f60a, \u00e9\u00e8.\n"
    texts = [{"text": f"{lead}<|user|>Say {number}.<|assistant|>{number}"} for number in range(4)]
    prepare(tmp_path, own, texts)
    assert render_prompt("Say 1.", own) == f"{lead}<|user|>Say 1.<|assistant|>"
    assert own(render_prompt("Say 1.", own)).input_ids


def test_rows_without_a_prompt_do_not_repeat_each_other(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": f"text {number}"} for number in range(4)]
    examination = examine(prepare(tmp_path, own, rows[:3], rows[3:]), own)
    assert found(examination, "leaked", "test rows").level == "ok"
    assert "repeated" not in {one.check for one in examination.findings}


def test_packed_rows_that_make_no_whole_batch_are_an_error(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    options = {"packing": True, "max_length": 1024, "dataloader_drop_last": True, "per_device_train_batch_size": 64}
    rows = prepare(tmp_path, own, ROWS * 2, **options)
    assert len(rows.train) > 64
    finding = found(examine(rows, own), "batch")
    assert finding.level == "error"
    assert "packed sequences at most make no whole batch of 64" in finding.message


def test_without_max_length_a_row_longer_than_the_context_is_an_error(
    own: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    context = CONFIGS["llama"]().max_position_embeddings
    long = {"instruction": "a", "output": "b " * context}
    finding = found(examine(prepare(tmp_path, own, [*ROWS, long], max_length=None), own), "length")
    assert finding.level == "error"
    assert f"tokens, and the model's context is {context}; set max_length" in finding.message
    healthy = examine(prepare(tmp_path, own, ROWS, max_length=None), own)
    assert "length" not in {one.check for one in healthy.findings}


def test_u06_rows_of_text_that_begin_otherwise_than_prompts_are_a_warning(
    own: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    written = render(chat(*TURN)["messages"], own)
    assert "beginning" not in {one.check for one in examine(prepare(tmp_path, own, [{"text": written}]), own).findings}
    examination = examine(prepare(tmp_path, own, [{"text": written}, {"text": "### Human: a"}]), own)
    finding = found(examination, "beginning")
    assert (finding.level, finding.figures["others"]) == ("warning", 1)
    assert "(first in row 2)" in finding.message


def test_the_programs_line_counts_further_errors_and_says_warnings() -> None:
    examination = Examination()
    examination.add("ok", "a", "b", "fine")
    examination.add("warning", "train rows", "c", "two\nlines")
    said: list[str] = []
    examination.stop_or_log(said.append)
    assert said == ["warning: train rows: two lines", "doctor: 2 checks, 1 warning"]
    examination.add("error", "a", "d", "first")
    examination.add("error", "a", "e", "second")
    with pytest.raises(UserError, match=r"^first \(1 more: see `plainlora doctor`\)$"):
        examination.stop_or_log(said.append)
    assert len(said) == 2


def test_some_empty_answers_are_a_warning(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    finding = found(examine(prepare(tmp_path, own, [*ROWS, ROWS[0] | {"output": ""}]), own), "empty")
    assert (finding.level, finding.figures["empty"]) == ("warning", 1)


def test_rows_that_make_no_batch_take_no_step(own: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    few = prepare(tmp_path, own, ROWS[:3], per_device_train_batch_size=4, dataloader_drop_last=True)
    assert found(examine(few, own), "batch").level == "error"
    enough = prepare(tmp_path, own, ROWS[:4], per_device_train_batch_size=4, dataloader_drop_last=True)
    assert enough.too_few is None
