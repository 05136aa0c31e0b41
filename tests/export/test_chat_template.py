"""The template in a file is rendered as Transformers renders the tokenizer's, or no file is written."""

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from plainlora.data.prompts import render_prompt
from plainlora.errors import UserError
from plainlora.export.chat_template import CHATS, llama_cpp_template
from plainlora.export.ollama import find_pieces, modelfile

# As published with SmolLM2-Instruct.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUMBERED = "{% for message in messages %}{{ loop.index }}. {{ message['content'] }}{% endfor %}"


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tokenizer)


@pytest.mark.parametrize("role", ["pad_token", "unk_token"])
def test_a_template_that_uses_what_llama_cpp_does_not_give_it_is_refused(
    role: str, chatty: PreTrainedTokenizerFast
) -> None:
    chatty.unk_token = "<|pad|>"
    chatty.chat_template = "{{ " + role + " }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="is rendered otherwise with what llama"):
        llama_cpp_template(chatty)


def test_a_template_that_renders_a_bos_that_is_not_there_is_refused(chatty: PreTrainedTokenizerFast) -> None:
    """A GGUF always has a BOS: what is left out is token 11."""
    chatty.chat_template = "{{ bos_token }}" + NUMBERED
    with pytest.raises(UserError, match="is rendered otherwise"):
        llama_cpp_template(chatty)


def test_without_a_template_messages_are_rendered_as_this_package_prompts(chatty: PreTrainedTokenizerFast) -> None:
    chatty.chat_template = None
    plain = render_prompt("Say hello.", chatty)
    chatty.chat_template, notes = llama_cpp_template(chatty)
    assert render_prompt("Say hello.", chatty) == plain
    assert len(notes) == 1


def test_a_modelfile_holds_what_the_template_writes_around_each_role(chatty: PreTrainedTokenizerFast) -> None:
    chatty.chat_template = SMOLLM2
    pieces = find_pieces(chatty)
    assert pieces is not None
    for chat in CHATS:
        assert pieces.render(chat) == chatty.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    text = modelfile("./m.gguf", "./lora.gguf", chatty, "a comment")
    assert text is not None
    assert text.splitlines()[1:3] == ["FROM ./m.gguf", "ADAPTER ./lora.gguf"]
    assert (
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if eq .Role "user" }}' in text
    )
    assert "{{ if not .System }}<|im_start|>system\nYou are a helpful" in text
    assert text.splitlines()[-1] == 'PARAMETER stop "<|endoftext|>"'


@pytest.mark.parametrize("template", [NUMBERED, SMOLLM2.replace("<|im_end|>' +", "{{' +")])
def test_a_template_that_go_cannot_tell_has_no_modelfile(template: str, chatty: PreTrainedTokenizerFast) -> None:
    chatty.chat_template = template
    assert modelfile("./m.gguf", None, chatty, "a comment") is None
