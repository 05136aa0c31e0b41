"""Each token's probability, beside a forward pass of the whole answer."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from plainlora.adapters.language_model import MODEL
from plainlora.chat.sampling import Sampling
from plainlora.chat.session import Session
from plainlora.chat.tokens import read_tokens
from tests.conftest import make_model


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=24), Sampling(True, 3.0, seed=1, max_new_tokens=24)])
def test_they_are_those_of_one_pass_over_the_whole_answer(
    sampling: Sampling, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama")
    session = Session(lambda: model, {MODEL: tokenizer}, {})
    with session.answer(MODEL, "Say the number after 3.", sampling, with_tokens=True) as answer:
        list(answer)
    assert "".join(token.text for token in answer.tokens).lstrip() == answer.text
    prompt = tokenizer("Say the number after 3.").input_ids
    torch.manual_seed(1)
    ids = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, eos_token_id=0,
        do_sample=sampling.do_sample, temperature=sampling.temperature, pad_token_id=1,
    )[0]  # fmt: skip
    with torch.no_grad():
        shares = model(input_ids=ids[None]).logits[0].softmax(-1)[len(prompt) - 1 : -1]
    own = shares.gather(1, ids[len(prompt) :, None])[:, 0]
    said = own[ids[len(prompt) :] > 1]  # no special tokens
    found = torch.tensor([token.probability for token in answer.tokens], dtype=torch.float64)
    assert 5 < len(found) <= len(said)  # a character of several tokens is one of them, with their product
    torch.testing.assert_close(found.log().sum(), said.double().log().sum(), rtol=1e-5, atol=1e-5)
    for token in answer.tokens:
        best = [share for _, share in token.alternatives]
        assert best == sorted(best, reverse=True)
        if not sampling.do_sample:
            assert token.alternatives[0][1] >= token.probability - 1e-6


def test_the_tokens_of_one_character_are_one_with_the_product_of_their_probabilities(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "a 🦉\nword2"
    ids = tokenizer(text).input_ids
    logits = torch.zeros(len(ids), 320)
    tokens = read_tokens(ids, logits, tokenizer)
    assert "".join(token.text for token in tokens) == text
    owl = next(token for token in tokens if "🦉" in token.text)
    assert len(ids) - len(tokens) in (2, 3)
    assert owl.probability == pytest.approx((1 / 320) ** (len(ids) - len(tokens) + 1))
    assert all(len(token.alternatives) == 5 for token in tokens)


def test_special_tokens_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer("word2").input_ids, 0]
    assert "".join(token.text for token in read_tokens(ids, torch.zeros(len(ids), 320), tokenizer)) == "word2"


def test_a_greedy_answer_is_that_of_generate(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from plainlora.generation import generate

    model = make_model("llama")
    model.generation_config.repetition_penalty = 3.0  # the checkpoint's own settings have no say
    session = Session(lambda: model, {MODEL: tokenizer}, {})
    for prompt in ("Say the number after 3.", "Repeat"):
        with session.answer(MODEL, prompt, Sampling(max_new_tokens=16)) as answer:
            pieces = list(answer)
        assert "".join(pieces) == answer.text
        assert [answer.text.strip()] == generate(model, tokenizer, [prompt], 16)
