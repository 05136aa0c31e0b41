"""The chat template as a program around llama.cpp renders it, compared with Transformers' rendering.

`llama-cpp-python` renders the template in the file by Jinja with less than Transformers gives it: only the texts of
BOS and EOS. Without one it renders Llama 2's, and a few published ones it replaces by functions of its own:
https://github.com/abetlen/llama-cpp-python/blob/v0.3.36/llama_cpp/llama_chat_format.py
(`guess_chat_format_from_gguf_metadata`)
"""

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from plainlora.data.prompts import Message, adds_bos, apply_template, assistant_message, user_message
from plainlora.errors import UserError

# What a chat may be: without a system message, with one, with several turns. A template may refuse some of them.
CHATS: tuple[list[Message], ...] = (
    [user_message("Name three primary colours.")],
    [{"role": "system", "content": "Answer in one word."}, user_message("2 + 2 =")],
    [user_message("Hi."), assistant_message("Hello!"), user_message("What is a tide?\nAnd a wave?")],
)
RENDERED_AS_JINJA = "{# Rendered by Jinja, as Transformers does. #}"
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def keep_jinja(template: str) -> str:
    """The same template with a comment, so that `llama-cpp-python` does not take it for one it has a function for.

    It compares whole texts. Its function for ChatML renders an empty system message where the template renders none.
    https://github.com/abetlen/llama-cpp-python/blob/v0.3.36/llama_cpp/llama_chat_format.py (`format_chatml`)
    """
    return template if template[:1].isspace() else RENDERED_AS_JINJA + template


def llama_cpp_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The template for the file, and what to know of it.

    Without a chat template of its own, a tokenizer gets one that renders messages as they are.

    Raises:
        UserError: It would be rendered otherwise than Transformers renders the tokenizer's.
    """
    if tokenizer.chat_template is None:
        bos = "{{ bos_token }}" if adds_bos(tokenizer) else ""
        return bos + PLAIN, ["the model has no chat template: a chat is rendered as the text of its messages"]
    template = keep_jinja(str(tokenizer.get_chat_template()))
    for chat in CHATS:
        expected = _by_transformers(chat, tokenizer)
        if expected is not None and (found := _by_llama_cpp(chat, template, tokenizer)) != expected:
            place = next((n for n, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} is rendered otherwise with what llama.cpp gives it: "
                f"{found[place:][:30]!r} where Transformers has {expected[place:][:30]!r}; no GGUF is written"
            )
    return template, []


def _by_transformers(chat: list[Message], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Transformers' rendering; `None` if the template refuses the chat."""
    try:
        return str(apply_template(chat, tokenizer, add_generation_prompt=True))
    except UserError:
        return None


def _by_llama_cpp(chat: list[Message], template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos = str(tokenizer.eos_token or "")
    given = {"bos_token": tokenizer.bos_token or eos, "eos_token": eos, "add_generation_prompt": True}
    try:
        return str(_compile_jinja_template(template).render(messages=chat, tools=None, **given))
    except Exception as error:  # whatever the template raises
        return f"an error, {error}"


def opens_with(tokenizer: PreTrainedTokenizerBase, tokens: set[str]) -> bool:
    """Whether every prompt begins with one of these tokens."""
    if tokenizer.chat_template is None:
        return adds_bos(tokenizer)
    rendered = filter(None, (_by_transformers(chat, tokenizer) for chat in CHATS))
    return all(text.startswith(tuple(tokens)) for text in rendered)
