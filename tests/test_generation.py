"""Greedy answers: what a base's own generation settings may not change, and where a context ends."""

from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import GenerationConfig, PreTrainedTokenizerFast

from plainlora.backends import BACKENDS
from plainlora.base.loading import load_causal_lm
from plainlora.errors import UserError
from plainlora.generation import generate


@pytest.mark.parametrize("backend", ["reference", "peft"])
def test_only_the_eos_of_a_bases_settings_has_a_say(
    model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast, backend: str
) -> None:
    model = load_causal_lm(str(model_dirs["llama"]))
    adapted = BACKENDS[backend].attach(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    prompts = ["Say the number after 3.", "Repeat"]
    greedy = generate(adapted, tokenizer, prompts, 12)
    own = GenerationConfig(num_beams=3, repetition_penalty=2.0, min_new_tokens=9, no_repeat_ngram_size=2)
    model.generation_config = own
    assert generate(adapted, tokenizer, prompts, 12) == greedy
    assert model.generation_config is own
    model.generation_config = GenerationConfig(eos_token_id=list(range(2, 320)))
    assert generate(adapted, tokenizer, prompts, 12) != greedy


@pytest.mark.parametrize("kind", ["gpt2", "llama"])  # positions that are learnt, and that are computed
def test_an_answer_ends_with_the_context(
    model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    model = load_causal_lm(str(model_dirs[kind]))
    model.generation_config.eos_token_id = None
    context = model.config.max_position_embeddings
    word = tokenizer("word").input_ids
    prompt = "word" * ((context - 3) // len(word))
    used = len(tokenizer(prompt).input_ids)
    assert context - len(word) - 3 <= used < context
    (answer,) = generate(model, tokenizer, [prompt], 300)
    assert len(answer) <= 8 * (context - used)
    with pytest.raises(UserError, match=rf"a prompt has \d+ tokens, and the model's context is {context}; shorten it"):
        generate(model, tokenizer, [prompt + prompt], 1)
