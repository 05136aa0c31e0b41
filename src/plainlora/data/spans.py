"""Finds the assistant's tokens in a rendered conversation: the template marks them, or they are derived."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import has_generation_markers

from plainlora.data.prompts import Message, apply_template, render
from plainlora.errors import UserError


def assistant_mask(
    messages: list[Message], ids: list[int], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> list[int]:
    """1 for each token of the assistant, 0 for the others.

    Args:
        messages: The whole conversation.
        ids: Its tokens.
        tokenizer: A tokenizer with a chat template.
        options: The template's other variables, and possibly a `chat_template` to use instead of the tokenizer's.

    Raises:
        UserError: No token is the assistant's, or the tokens cannot be derived.
    """
    source = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    if has_generation_markers(source):
        marked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        mask: list[int] = apply_template(messages, tokenizer, **options, **marked)["assistant_masks"]
    else:
        mask = derive_mask(messages, ids, tokenizer, options)
    if not any(mask):
        if any(message["role"] == "assistant" for message in messages):
            raise UserError("the chat template renders no assistant message, so nothing would be trained")
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise UserError(
            f"no message is the assistant's (the roles are {roles}), so nothing would be trained; name the roles user "
            "and assistant"
        )
    return mask


def derive_mask(
    messages: list[Message], ids: list[int], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> list[int]:
    """The mask for a template without markers: the tokens that each answer adds to its prompt.

    For an assistant message `i` these are the tokens from the end of `messages[:i]` with the generation prompt to the
    end of `messages[:i + 1]`. Both must be prefixes of the whole conversation. Arguments are those of
    `assistant_mask`.

    Raises:
        UserError: One of them is not a prefix, so the answer's tokens cannot be derived.
    """

    def tokens(prefix: list[Message], for_generation: bool) -> int:
        text = render(prefix, tokenizer, for_generation, options)
        found = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if ids[: len(found)] != found:
            raise UserError("the template renders earlier messages differently without it, or a token merges with it")
        return len(found)

    mask = [0] * len(ids)
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                start, end = tokens(messages[:at], True), tokens(messages[: at + 1], False)
            except UserError as error:
                raise UserError(
                    f"the chat template does not mark the assistant's tokens, and those of message {at + 1} cannot be "
                    f"derived: {error}; give one with {{% generation %}} markers: --prompt_template FILE.jinja"
                ) from error
            mask[start:end] = [1] * (end - start)
    return mask
