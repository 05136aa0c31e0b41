"""Base and adapters take turns on one base: each answers as it does alone, and none is mixed with another."""

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from plainlora.adapters.language_model import BASE, MODEL, TUNED, answer_names
from plainlora.backends import BACKENDS
from plainlora.chat.sampling import Sampling
from plainlora.chat.session import Session, open_adapters, open_model
from plainlora.errors import UserError
from plainlora.generation import PromptTooLong, generate
from tests.conftest import make_model, random_ids
from tests.lora.oracle import save_peft_adapter

PROMPT = "Say the number after 3."
SHORT = Sampling(max_new_tokens=16)


def asked(session: Session, name: str, prompt: str = PROMPT, sampling: Sampling = SHORT, strength: float = 1) -> str:
    with session.answer(name, prompt, sampling, strength) as answer:
        for _ in answer:
            pass
    return answer.text.strip()


@pytest.fixture
def two(tmp_path: Path, model_dirs: dict[str, Path]) -> list[str]:
    """Two adapters on a base; one has biases and a module trained whole."""
    whole: dict[str, Any] = {"bias": "all", "modules_to_save": ["lm_head"]}
    return [
        save_peft_adapter(tmp_path / "one", model_dirs["gpt2"], "gpt2"),
        save_peft_adapter(tmp_path / "two", model_dirs["gpt2"], "gpt2", **whole),
    ]


def test_each_answers_as_it_does_alone_in_any_order(two: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    expected = {BASE: generate(make_model("gpt2"), tokenizer, [PROMPT], 16)[0]}
    for adapter in two:
        model = BACKENDS["reference"].load(make_model("gpt2"), adapter)
        expected[adapter] = generate(model, tokenizer, [PROMPT], 16)[0]
    assert len(set(expected.values())) == 3
    session = open_adapters(two)
    assert session.names == [BASE, *two]
    for name in (two[1], BASE, two[0], two[1], two[1], BASE):
        assert asked(session, name) == expected[name]
    session.close()


def test_a_whole_model_answers(model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    session = open_model(str(model_dirs["llama"]))
    assert session.names == [MODEL]
    assert asked(session, MODEL) == generate(make_model("llama"), tokenizer, [PROMPT], 16)[0]


def test_strength_changes_the_answer_of_its_question_alone(two: list[str]) -> None:
    session = open_adapters(two[:1])
    tuned, base = asked(session, TUNED), asked(session, BASE)
    assert asked(session, TUNED, strength=0) == base != tuned
    assert asked(session, TUNED, strength=2) not in (base, tuned)
    assert asked(session, TUNED) == tuned
    with pytest.raises(ZeroDivisionError), session.model_of(TUNED, 2.0):
        _ = 1 / 0
    assert asked(session, TUNED) == tuned


def test_a_seed_makes_an_answer_again_and_without_one_it_varies(two: list[str]) -> None:
    session = open_adapters(two[:1])
    seeded = Sampling(do_sample=True, temperature=3.0, seed=5, max_new_tokens=16)
    first = asked(session, TUNED, sampling=seeded)
    asked(session, BASE, sampling=seeded)
    assert asked(session, TUNED, sampling=seeded) == first
    free = Sampling(do_sample=True, temperature=3.0, max_new_tokens=16)
    assert len({asked(session, TUNED, sampling=free) for _ in range(3)}) == 3


def test_many_who_ask_at_once_get_their_own_answers(two: list[str]) -> None:
    session = open_adapters(two)
    expected = {name: asked(session, name) for name in session.names}
    found: list[tuple[str, str]] = []

    def ask(name: str) -> None:
        found.append((name, asked(session, name)))

    threads = [threading.Thread(target=ask, args=(name,)) for name in session.names * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(answer == expected[name] for name, answer in found)


def test_an_answer_that_nobody_reads_on_ends_and_leaves_the_model_as_it_was(two: list[str]) -> None:
    session = open_adapters(two[:1])
    session.model.generation_config.eos_token_id = None
    tuned = asked(session, TUNED)
    long = Sampling(max_new_tokens=200)
    with session.answer(TUNED, PROMPT, long, strength=2.0, with_tokens=True) as answer:
        list(answer)
    whole = len(answer.tokens)
    for _ in range(3):
        with session.answer(TUNED, PROMPT, long, strength=2.0, with_tokens=True) as answer:
            time.sleep(0.05)
        assert len(answer.tokens) < whole / 2
    assert asked(session, TUNED) == tuned


def test_what_the_model_cannot_take_is_said(two: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    session = open_adapters(two[:1])
    with pytest.raises(PromptTooLong, match="the model's context is 256; shorten it"):
        asked(session, BASE, "word" * 300)
    longer = copy.deepcopy(tokenizer)
    longer.add_special_tokens({"additional_special_tokens": ["<|none|>"] + [f"<|{n}|>" for n in range(300)]})
    session.tokenizers[BASE] = longer
    with pytest.raises(UserError, match="and the model has embeddings for 320 tokens"):
        asked(session, BASE, "<|299|>")


def test_an_error_while_it_answers_reaches_who_asked(two: list[str]) -> None:
    session = open_adapters(two[:1])
    (Path(two[0]) / "adapter_model.safetensors").unlink()
    with pytest.raises(Exception, match=r"adapter_model\.safetensors"):
        asked(session, TUNED)
    assert asked(session, BASE)


def test_an_adapter_that_changes_its_base_is_refused(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa",
        base_model_name_or_path=str(model_dirs["llama"]),
    )  # fmt: skip
    model = get_peft_model(make_model("llama"), config)
    model.peft_config["default"].base_model_name_or_path = str(model_dirs["llama"])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="so base and adapter cannot take turns on it; use plainlora generate"):
        open_adapters([str(tmp_path / "adapter")])


def test_the_model_of_a_name_is_the_base_or_the_adapter(two: list[str]) -> None:
    session = open_adapters(two)
    base = make_model("gpt2")
    with torch.no_grad():
        with session.model_of(two[1]) as model:
            tuned = model(input_ids=random_ids()).logits
        with session.model_of(BASE) as model:
            assert torch.equal(model(input_ids=random_ids()).logits, base(input_ids=random_ids()).logits)
        by_itself = BACKENDS["reference"].load(base, two[1])
        assert torch.equal(tuned, by_itself(input_ids=random_ids()).logits)


def test_no_adapter_takes_the_name_of_the_base() -> None:
    assert answer_names(["base"]) == ["tuned"]
    assert answer_names(["base", "tuned", "runs/base"]) == ["./base", "./tuned", "runs/base"]
