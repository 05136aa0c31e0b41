"""Loads a base's tokenizer with EOS and a pad token, and checks that it fits the embeddings."""

import json
import os
from collections.abc import Iterable

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from plainlora.base.failures import explain
from plainlora.errors import UserError


def load_tokenizer(
    name: str,
    revision: str | None = None,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token that differs from EOS if the vocabulary has an unknown token to use.

    Raises:
        UserError: It cannot be loaded or has no vocabulary, or a named token is not in it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises `Exception` itself
        raise explain(name, "tokenizer", error) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # so loads a folder without a tokenizer
        raise UserError(
            f"{name} holds no tokenizer, or one without a vocabulary; copy the base's tokenizer files there"
        )
    try:  # half of a surrogate pair can be read from a file, but saving it would fail after training
        json.dumps([tokenizer.init_kwargs, tokenizer.chat_template], default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the tokenizer of {name} holds text that is not UTF-8 ({error}); copy it again") from error
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise UserError(
            f"{name}/tokenizer_config.json: model_max_length is not a number: {tokenizer.model_max_length!r:.60}"
        )
    for role, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise UserError(f"{role} {token!r} is not in the vocabulary of {name}")
            setattr(tokenizer, role, token)
    if tokenizer.pad_token is None or (pad_token is None and tokenizer.pad_token == tokenizer.eos_token):
        # EOS would work here, because labels come from lengths; in other code pad == eos masks EOS out of the loss.
        unknown = tokenizer.unk_token
        tokenizer.pad_token = unknown if unknown not in (None, tokenizer.eos_token) else tokenizer.eos_token
    if tokenizer.pad_token is None:
        lost = os.path.isdir(name) and not os.path.isfile(os.path.join(name, "tokenizer_config.json"))
        advice = "copy the base's tokenizer_config.json, which is missing" if lost else "fix its tokenizer_config.json"
        raise UserError(f"the tokenizer of {name} has no EOS token, and none to pad with; set eos_token, or {advice}")
    tokenizer.padding_side = "right"
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raises `UserError` if the tokenizer has tokens without an embedding in the model.

    Special tokens without a role are not checked: some tokenizers have unused ones.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    unused = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - set(roles)
    tokens = ((token, number) for token, number in tokenizer.get_vocab().items() if token not in unused)
    token, number = max(tokens, key=lambda pair: pair[1])
    if isinstance(rows, int) and number >= rows:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer gives {token!r:.40} the id {number}, and the model has "
            f"embeddings for {rows} tokens; use the tokenizer that belongs to the model"
        )


def check_known(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raises `UserError` for a token without an embedding; `check_vocabulary` does not check special ones."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(ids, default=0)
    if isinstance(rows, int) and largest >= rows:
        raise UserError(
            f"the prompt holds {tokenizer.convert_ids_to_tokens(largest)!r:.40}, token {largest} of the tokenizer, "
            f"and the model has embeddings for {rows} tokens; take it out of the prompt"
        )


def check_ending(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raises `UserError` for an encoder-decoder whose tokenizer adds no EOS: its head reads the EOS of a text."""
    if config.is_encoder_decoder and tokenizer("text").input_ids[-1:] != [config.eos_token_id]:
        raise UserError(
            f"the head of {config.model_type} models reads the token {config.eos_token_id} at the end of a text, and "
            f"{tokenizer.name_or_path}'s tokenizer adds none; give a base with its own tokenizer"
        )
