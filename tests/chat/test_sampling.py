"""Settings of an answer: refused by name where they are out of range or would be ignored."""

from typing import Any

import pytest

from plainlora.chat.sampling import Sampling
from plainlora.errors import UserError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.7}, "temperature is for sampling, and answers are greedy; add do_sample"),
        ({"top_k": 3}, "top_k is for sampling"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be a number above 0, not 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be a number above 0, not nan"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p must lie in \(0, 1\], not 1.5"),
        ({"do_sample": True, "top_k": -1}, "top_k must be at least 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Sampling(**settings)


def test_it_reaches_transformers_by_its_own_names() -> None:
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.2}
    config = Sampling(True, max_new_tokens=9, seed=3, **given).config(5, [0], 1)  # type: ignore[arg-type]
    assert {name: getattr(config, name) for name in given} == given
    assert (config.do_sample, config.max_new_tokens, config.eos_token_id, config.pad_token_id) == (True, 5, [0], 1)
    assert Sampling().config(None, None, None).max_new_tokens == 256
