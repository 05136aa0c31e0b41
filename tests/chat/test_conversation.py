"""A conversation is rendered as training renders it, and saved as a row that training takes."""

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plainlora.chat.conversation import Conversation, check_system
from plainlora.data.datasets import load_split
from plainlora.data.encoding import encode_rows
from plainlora.data.prompts import install_template, render_prompt
from plainlora.errors import UserError
from tests.conftest import ROOT

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHATML
    return own


def test_the_whole_of_it_is_rendered_and_one_question_is_that_of_generate(chatty: PreTrainedTokenizerFast) -> None:
    conversation = Conversation()
    assert conversation.prompt(" Name it. ", chatty) == render_prompt("Name it.", chatty)
    conversation.system = "Be brief."
    conversation.add(" Name it. ", " A cat.\n")
    expected = "<|system|>Be brief.\n<|user|>Name it.\n<|assistant|>A cat.\n<|user|>And?\n<|assistant|>"
    assert conversation.prompt("And?", chatty) == expected
    assert len(conversation.turns) == 2


def test_without_a_template_a_question_stands_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation()
    conversation.add("one", "two")
    assert conversation.prompt("three", tokenizer) == "three"
    assert conversation.row(tokenizer) == {"prompt": "one", "completion": "two"}
    with pytest.raises(UserError, match="a system prompt needs a chat template"):
        check_system("Be brief.", tokenizer)


def test_an_empty_question_and_an_empty_conversation_are_refused(chatty: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="the question is empty"):
        Conversation().prompt(" \n", chatty)
    with pytest.raises(UserError, match="there is nothing to save yet"):
        Conversation().row(chatty)


def test_a_system_prompt_that_would_not_reach_the_model_is_refused(chatty: PreTrainedTokenizerFast) -> None:
    check_system("Be brief.", chatty)
    check_system("", chatty)
    chatty.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="leaves a system prompt out"):
        check_system("Be brief.", chatty)
    with pytest.raises(UserError, match="leaves a system prompt out"):
        Conversation("Be brief.").prompt("Name it.", chatty)
    install_template(chatty, "alpaca")
    with pytest.raises(UserError, match="knows the roles user and assistant"):
        check_system("Be brief.", chatty)


@pytest.mark.parametrize("template", ["quickstart", None])
def test_a_saved_row_is_taken_back_by_training(
    template: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = AutoTokenizer.from_pretrained(ROOT / "recipes/quickstart/base") if template else tokenizer
    if template:
        install_template(own, "alpaca")
    conversation = Conversation()
    conversation.add("Name it.", "A cat: \u00e9\u2028.")
    conversation.add("And?", "A dog.")
    row = conversation.row(own)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = load_split(str(tmp_path / "rows.jsonl"), "train")
    assert rows[0] == row
    encoded, _ = encode_rows(
        rows, own, where="rows", text_column="text", answers_only=True, max_length=None, on_overflow="drop",
        max_truncated=0.0,
    )  # fmt: skip
    answer = own.decode([label for label in encoded[0]["labels"] if label != -100])
    assert "A dog." in answer
