"""A tokenizer that cannot be used, or does not fit the base, is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from plainlora.base.config import load_config
from plainlora.base.tokenizer import check_vocabulary, load_tokenizer
from plainlora.errors import UserError
from tests.conftest import VOCABULARY


def test_a_tokenizer_that_cannot_be_used_is_refused(edited: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="model_max_length is not a number: 'long'"):
        load_tokenizer(edited("tokenizer_config.json", model_max_length="long"))
    with pytest.raises(UserError, match="has no EOS token, and none to pad with; set eos_token"):
        load_tokenizer(edited("tokenizer_config.json", model_max_length=9, eos_token=None, pad_token=None))


def test_words_without_an_embedding_are_refused(edited: Callable[..., str], model_dirs: dict[str, Path]) -> None:
    own = load_tokenizer(str(model_dirs["llama"]))
    config = load_config(str(model_dirs["llama"]))
    check_vocabulary(own, config)
    own.add_tokens(["<never used>"], special_tokens=True)
    assert own.get_vocab()["<never used>"] == VOCABULARY
    check_vocabulary(own, config)
    own.add_tokens(["a new word"])
    with pytest.raises(
        UserError, match=rf"'a new word' the id {VOCABULARY + 1}, and the model has .* {VOCABULARY} to"
    ):
        check_vocabulary(own, config)
    for role in ("pad_token", "eos_token"):
        tokenizer = load_tokenizer(edited("tokenizer_config.json", **{role: "<new>"}))
        with pytest.raises(UserError, match=f"'<new>' the id {VOCABULARY}, and the model has embeddings"):
            check_vocabulary(tokenizer, config)
