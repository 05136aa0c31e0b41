"""What models are asked, and the figures made of their answers."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from plainlora.data.prompts import install_template, render_prompt
from plainlora.errors import UserError
from plainlora.merging.certificate import agreement, drift, mean_loss, perplexity, table
from plainlora.merging.eval_prompts import LONGEST, MOST_GIVEN, answered, classifier_prompts, language_prompts
from plainlora.merging.reload import ask
from tests.conftest import CONFIGS, make_model, random_ids

LOGITS = torch.tensor([[[0.0, 2.0], [-4.0, 1.0]]])
NONE = torch.zeros(0, 2, dtype=torch.float64)


def answers(logits: torch.Tensor = LOGITS, *tokens: list[int]) -> dict[str, torch.Tensor]:
    found = {f"tokens.{number}": torch.tensor(row) for number, row in enumerate(tokens)}
    return {"logits.0": logits, "losses": NONE, **found}


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_ask_gives_the_losses_and_the_continuations_of_transformers_own(kind: str) -> None:
    model = make_model(kind)
    rows = random_ids(3, 12).tolist()
    masked = [-100] * 5 + rows[0][5:]
    texts = [{"input_ids": rows[0], "labels": masked}, {"input_ids": rows[1], "labels": rows[1]}]
    ids = torch.tensor(rows[2:])
    settings = GenerationConfig(do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=1)
    model.generation_config.eos_token_id = None
    own = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    found = ask(model, {"prompts": [{"input_ids": own[0].tolist(), "start": 12}], "texts": texts})
    assert found["tokens.0"].tolist()[:6] == own[0, 12:].tolist()  # and then what would come next
    torch.testing.assert_close(found["logits.0"], model(input_ids=own).logits)

    nats = [
        float(model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss) * count
        for row, count in zip(texts, (7, 11), strict=True)
    ]
    assert found["losses"][:, 1].tolist() == [7, 11]
    assert found["losses"][:, 0].tolist() == pytest.approx(nats, rel=1e-5)
    assert mean_loss(found) == pytest.approx(sum(nats) / 18, rel=1e-5)
    figures = perplexity(found)
    assert figures["perplexity"] == pytest.approx(math.exp(sum(nats) / 18), rel=1e-5)
    assert (figures["perplexity_rows"], figures["perplexity_tokens"]) == (2, 18)


def test_the_figures_of_an_agreement() -> None:
    expected = answers(LOGITS, [1, 2, 3], [4, 5, 6])
    same = agreement(expected, answers(LOGITS, [1, 2, 3], [4, 5, 6]))
    assert same == {
        "max_abs_diff": 0.0, "relative_diff": 0.0, "prompts": 2, "positions": 2, "tokens": 6,
        "equal_tokens": 6, "equal_share": 1.0, "first_difference": None,
    }  # fmt: skip
    moved = agreement(expected, answers(LOGITS + torch.tensor([0.0, -0.5]), [1, 2, 3], [4, 0, 6]))
    assert (moved["max_abs_diff"], moved["relative_diff"]) == (0.5, 0.125)
    assert moved["equal_tokens"] == 5
    assert moved["first_difference"] == {"prompt": 1, "position": 1}


def test_the_tenth_prompt_comes_after_the_ninth() -> None:
    rows = [[1]] * 11
    changed = [*rows[:9], [2], [2]]
    assert agreement(answers(LOGITS, *rows), answers(LOGITS, *changed))["first_difference"]["prompt"] == 9


def test_classes_are_counted() -> None:
    expected = {f"logits.{n}": torch.tensor([row]) for n, row in enumerate([[1.0, 2.0], [3.0, 1.0]])} | {
        "losses": NONE
    }
    found = expected | {"logits.1": torch.tensor([[0.0, 1.0]])}
    figures = agreement(expected, found)
    assert (figures["classes"], figures["equal_classes"]) == (2, 1)
    assert perplexity(found) == {"perplexity": None, "perplexity_rows": 0, "perplexity_tokens": 0}


@pytest.mark.parametrize("place", [0, 1])
def test_a_model_that_answers_with_nan_agrees_with_nothing(place: int) -> None:
    broken = LOGITS.clone()
    broken[0, place] = torch.nan
    for pair in ((LOGITS, broken), (broken, LOGITS)):
        difference, relative = drift(*map(answers, pair))
        assert math.isnan(difference)
        assert not relative <= 1.0


def test_text_is_cut_to_the_context_and_to_what_a_processor_reads_soon(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one two three\n" * 3000)
    for context, longest in ((100, 100), (None, LONGEST)):
        eval_prompts = language_prompts(tokenizer, context, file, {})
        lengths = [len(row["input_ids"]) for row in eval_prompts.questions["texts"]]
        assert max(lengths) == longest
        assert MOST_GIVEN - longest < sum(lengths) <= MOST_GIVEN
        assert eval_prompts.tokens == sum(lengths) - len(lengths)
        assert eval_prompts.source == f"the text {file.name}"


@pytest.mark.parametrize(("content", "said"), [(b"", "no text"), (b" \n\t\n", "no text"), (b"\xff\xfe\x00", "UTF-8")])
def test_what_is_no_text(content: bytes, said: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    for make in (language_prompts, classifier_prompts):
        with pytest.raises(UserError, match=rf"--text .*{said}"):
            make(tokenizer, None, file, {})
        with pytest.raises(UserError, match="cannot be read as text"):
            make(tokenizer, None, tmp_path / "gone.txt", {})


def run_of(rows: Path, **changed: Any) -> dict[str, Any]:
    arguments = {
        "dataset_name": str(rows), "dataset_config": None, "dataset_train_split": "train", "seed": 3,
        "dataset_test_split": "test", "eval_dataset_name": None, "test_split_size": 8, "dataset_text_field": "text",
        "completion_only_loss": True, "assistant_only_loss": False,
    }  # fmt: skip
    return {"arguments": arguments | changed}


def test_the_run_s_own_test_rows_are_taken_if_they_can_be_had(
    rows_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    install_template(tokenizer, "alpaca")
    own = language_prompts(tokenizer, 256, None, run_of(rows_file))
    assert own.source == f"test rows of {rows_file}"
    assert 1 < own.rows <= 8
    for row in own.questions["texts"]:
        assert row["labels"][0] == -100  # the prompt's, as in training
        assert row["labels"][-1] == tokenizer.eos_token_id
    assert own.tokens < language_prompts(tokenizer, 256, None, run_of(rows_file, completion_only_loss=False)).tokens
    for run in ({}, run_of(tmp_path / "gone.jsonl"), run_of(rows_file, test_split_size=None), {"arguments": {}}):
        assert language_prompts(tokenizer, 256, None, run).source == "a built-in passage"


def test_answers_are_surprising_up_to_their_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    questions = answered(tokenizer, [render_prompt("Repeat", tokenizer)], ["word2"])
    (row,) = questions["texts"]
    kept = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(kept) == "word2<|endoftext|>"
    (prompt,) = questions["prompts"]
    assert tokenizer.decode(prompt["input_ids"][prompt["start"] :]) == "word2"
    assert len(ask(make_model("llama"), questions)["tokens.0"]) == len(kept)  # a guess for each, the EOS too


def test_the_reloading_program_imports_nothing_of_this_package(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    """It is asked as the merge asks it, by name, and answers as a stranger's model does."""
    import plainlora.merging.reload as program

    assert "plainlora." not in Path(program.__file__).read_text().replace("plainlora.merging.reload", "")
    questions, found = tmp_path / "questions.json", tmp_path / "answers.safetensors"
    questions.write_text(json.dumps({"prompts": [{"input_ids": [5, 6]}], "texts": []}))
    program.main(str(model_dirs["gpt2"]), str(questions), str(found))
    from safetensors.torch import load_file

    model = AutoModelForCausalLM.from_pretrained(model_dirs["gpt2"])
    torch.testing.assert_close(load_file(found)["logits.0"], model(input_ids=torch.tensor([[5, 6]])).logits.detach())


def test_the_table_has_a_line_for_each_model() -> None:
    figures = {"max_abs_diff": 1e-6, "relative_diff": 2e-7, "tokens": 64, "equal_tokens": 63}
    figures |= {"prompts": 4, "positions": 120}
    arms = {"base": {"perplexity": 9.0}, "adapter": {"perplexity": 2.0}}
    certificate = {
        "base": {"kind": "16bit"},
        "figures": {"bases": {"16bit": arms}, "merged": {"perplexity": 2.5, "against": {"16bit": figures}}},
        "measured_on": {"text": "a built-in passage", "rows": 2, "tokens": 287},
    }
    head, base, adapter, merged, last = table(certificate).splitlines()
    assert head.split()[:3] == ["perplexity", "equal", "tokens"]
    assert (base.split(), adapter.split()) == (["base", "9.000"], ["with", "the", "adapter", "2.000"])
    assert merged.split("  ")[-1] == "1.0e-06, 2.0e-07 of the largest"
    assert "63 of 64" in merged
    assert last == (
        "perplexity on a built-in passage (2 rows, 287 tokens); tokens and logits on 4 prompts with their answers "
        "(120 tokens)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_computed_with_in_float32_and_keep_their_values(dtype: torch.dtype) -> None:
    model = make_model("qwen2").to(dtype).eval()  # tied
    kept = copy.deepcopy(model.state_dict())
    ids = random_ids(1, 12)
    questions = {"prompts": [{"input_ids": ids[0].tolist()}], "texts": []}
    found = [ask(model, questions | {"float32": each})["logits.0"] for each in (True, False)]
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == kept[name].dtype
        assert torch.equal(tensor, kept[name])
    with torch.no_grad():
        assert torch.equal(found[1], model(input_ids=ids).logits.float())
        assert torch.equal(found[0], model.float()(input_ids=ids).logits)
    assert not torch.equal(*found)
