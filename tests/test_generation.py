"""Greedy answers: what a base's own generation settings may not change, and where a context ends."""

import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import GenerationConfig, PreTrainedTokenizerFast

from plainlora.backends import BACKENDS
from plainlora.base.config import load_config
from plainlora.base.loading import load_causal_lm
from plainlora.data.encoding import Encoder
from plainlora.data.layouts import find_schema
from plainlora.errors import UserError
from plainlora.generation import ExactMatch, check_prompts, generate


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


def test_a_prompt_near_the_end_of_the_context_shortens_no_other_answer(
    model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_causal_lm(str(model_dirs["gpt2"]))
    model.generation_config.eos_token_id = None
    word = len(tokenizer("word").input_ids)
    long = "word" * ((model.config.max_position_embeddings - 3) // word)
    alone = [generate(model, tokenizer, [prompt], 20)[0] for prompt in ("Say 1.", "Repeat", long)]
    assert generate(model, tokenizer, ["Say 1.", "Repeat", long], 20) == alone
    assert len(tokenizer(alone[0]).input_ids) > 4


def test_the_refusal_of_plain_text_names_its_own_column(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="exact_match_rows needs rows with an answer of their own"):
        ExactMatch(Dataset.from_dict({"body": ["a"]}), 1, tokenizer, "body")


def test_a_token_without_an_embedding_is_refused(
    model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, longer = load_causal_lm(str(model_dirs["llama"])), copy.deepcopy(tokenizer)
    longer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in range(300)]})
    with pytest.raises(
        UserError, match=r"the prompt holds '<\|299\|>', token \d+ of the tokenizer, and the model has"
    ):
        generate(model, longer, ["Repeat", "Repeat <|299|>"], 1)


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Oslo"}}}
CHATML = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<' + m.role + '>' + (m.content or '') }}"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
USER, RED, BLUE = (
    {"role": role, "content": said} for role, said in (("user", "A?"), ("assistant", "Red "), ("assistant", "Blue"))
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER], "completion": [RED, USER, BLUE]}, "Red"),
        ({"messages": [USER, RED, USER, BLUE, USER]}, "Blue"),
        ({"conversations": [{"from": "user", "value": "A?"}, {"from": "assistant", "value": "Red"}]}, "Red"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [CALL]},
            '{"name": "clock", "arguments": {"zone": "Oslo"}}',
        ),
    ],
)
def test_a_row_is_asked_and_expected_to_answer_as_it_trains(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], expected: str
) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHATML
    rows = Dataset.from_list([row], on_mixed_types="use_json")
    asked = ExactMatch(rows, 1, own)
    assert (asked.questions, asked.expected) == (["A?"], [expected])
    encoded = Encoder(own, find_schema(rows, "text", "rows"), "text", answers_only=False)(rows[0])
    trained = own.decode(encoded["input_ids"])
    assert trained.startswith(asked.prompts[0])
    assert trained.removeprefix(asked.prompts[0]).startswith(expected)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "sample_prompts: prompt 2 is empty, and there is no chat template; give some text"),
        (
            "word " * 300,
            r"sample_prompts: a prompt has \d+ tokens, and .* context is 256; shorten it \(prompt 2\)",
        ),
    ],
)
def test_what_cannot_be_answered_after_training_is_said_before(
    prompt: str, said: str, model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = load_config(str(model_dirs["llama"]))
    check_prompts("sample_prompts", ["fine", "fine"], tokenizer, config)
    with pytest.raises(UserError, match=f"^{said}$"):
        check_prompts("sample_prompts", ["fine", prompt], tokenizer, config)
