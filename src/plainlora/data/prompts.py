"""One renderer for training, evaluation and generation: the tokenizer's chat template.

The template used in training is saved with the tokenizer (`chat_template.jinja`), so a server renders prompts in the
same way. The built-in templates are the files in `templates/`.
"""

from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from plainlora.errors import UserError

Message = dict[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
NO_TEMPLATE = "the tokenizer has no chat template: set prompt_template to alpaca, llama2 or a .jinja file"
INPUT_MARK = "\n\n### Input:\n"  # the Alpaca template looks for it; see templates/alpaca.jinja


class BrokenTemplate(UserError):
    """A chat template that cannot be used, whatever the messages are."""


def user_message(instruction: str, context: str = "") -> Message:
    """An instruction, with its optional input, as one chat message."""
    content = instruction.strip()
    return {"role": "user", "content": content + INPUT_MARK + context.strip() if context.strip() else content}


def assistant_message(answer: str) -> Message:
    """An answer as a chat message."""
    return {"role": "assistant", "content": answer.strip()}


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS before every text by itself (Llama does, GPT-2 and Qwen2 do not)."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Removes a written BOS from a text if the tokenizer adds one, so that there are not two."""
    return text.removeprefix(str(tokenizer.bos_token)) if adds_bos(tokenizer) else text


def plain_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Plain text with the BOS written out if the tokenizer adds one; to be tokenised without special tokens."""
    return (str(tokenizer.bos_token) if adds_bos(tokenizer) else "") + without_bos(prompt, tokenizer)


def install_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Sets the tokenizer's chat template to a built-in one or a file; `None` leaves its own.

    Raises:
        UserError: There is no such template.
    """
    if template is None:
        return
    built_in = TEMPLATES / f"{template}.jinja"
    path = built_in if built_in.is_file() else Path(template)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
        raise UserError(f"prompt_template: {template!r} is neither a built-in template ({names}) nor a .jinja file")
    try:
        source = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_template: {path} cannot be read: {error}") from error
    try:
        _compile_jinja_template(source)
    except Exception as error:  # of any class, as in `apply_template`
        raise BrokenTemplate(f"prompt_template: {path} is not a chat template: {_fault(error)}") from error
    # The tokenizer adds no BOS to rendered text, so a built-in template writes it if the model expects one.
    bos = "{{- bos_token -}}" if path == built_in and adds_bos(tokenizer) else ""
    tokenizer.chat_template = bos + source


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's template that marks the assistant's tokens; `None` if the tokenizer's own does, or TRL has none for it.

    https://huggingface.co/docs/trl/v1.16.0/en/chat_templates#training-templates

    Raises:
        UserError: The tokenizer has no template.
        BrokenTemplate: The template has a syntax error.
    """
    if tokenizer.chat_template is None:
        raise UserError(NO_TEMPLATE)
    try:
        _compile_jinja_template(tokenizer.get_chat_template())
        return None if has_generation_markers(tokenizer.chat_template) else get_training_chat_template(tokenizer)
    except TemplateSyntaxError as error:
        raise _broken_template(tokenizer, error) from error
    except Exception:  # TRL has none, or the template fails on TRL's example
        return None


def apply_template(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, tokenize: bool = False, **options: Any
) -> Any:
    """`tokenizer.apply_chat_template` with errors that name the conversation's roles.

    Args:
        messages: The conversation.
        tokenizer: A tokenizer with a chat template.
        tokenize: Whether the text is tokenised too.
        **options: For `apply_chat_template`.

    Raises:
        UserError: The template refuses the messages.
        BrokenTemplate: The template has a syntax error.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
    except TemplateSyntaxError as error:
        raise _broken_template(tokenizer, error) from error
    except Exception as error:  # Jinja's own errors and whatever the template raises
        roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages)) or "nothing"
        raise UserError(
            f"the chat template cannot render a conversation of {roles}: {error}; change the messages or the template"
        ) from error


def _broken_template(tokenizer: PreTrainedTokenizerBase, error: TemplateSyntaxError) -> BrokenTemplate:
    return BrokenTemplate(f"the chat template of {tokenizer.name_or_path} is not valid: {_fault(error)}")


def _fault(error: Exception) -> str:
    return f"{error.message} (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else str(error)


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    for_generation: bool = False,
    options: dict[str, Any] | None = None,
) -> str:
    """The text of a conversation, ready to be tokenised without further special tokens.

    Args:
        messages: The conversation.
        tokenizer: A tokenizer with a chat template.
        for_generation: Whether to add the generation prompt.
        options: The template's other variables, and possibly a `chat_template` to use instead of the tokenizer's.

    Raises:
        UserError: The tokenizer has no template, or see `apply_template`.
    """
    if tokenizer.chat_template is None:
        raise UserError(NO_TEMPLATE)
    given = (options or {}) | ({"add_generation_prompt": True} if for_generation else {})
    return str(apply_template(messages, tokenizer, **given))


def render_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, context: str = "") -> str:
    """A single prompt rendered as in training; without a chat template, as plain text."""
    if tokenizer.chat_template is None:
        return plain_prompt(prompt + context, tokenizer)
    return render([user_message(prompt, context)], tokenizer, for_generation=True)
