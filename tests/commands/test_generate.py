"""`plainlora generate` and `plainlora merge` as typed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plainlora.commands import main
from plainlora.data.prompts import install_template, render_prompt
from tests.test_merging import trained_adapter


def with_template(adapter: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    install_template(tokenizer, "alpaca")
    tokenizer.save_pretrained(adapter)
    return adapter


def answers_in(printed: str) -> dict[str, str]:
    blocks = printed.split("\n[")[1:]
    return {block.split("]\n", 1)[0]: block.split("]\n", 1)[1].strip() for block in blocks}


def test_base_and_tuned_and_peft_answer_side_by_side(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = with_template(trained_adapter("llama", model_dirs, tmp_path / "adapter", scale=0.5))
    main(["generate", "--adapter", str(adapter), "--prompt", "Name it.", "--max_new_tokens", "12", "--with_peft"])
    answers = answers_in(capfd.readouterr().out)
    assert answers["tuned"] == answers["tuned, by PEFT"]
    assert answers["tuned"] != answers["base"]


def test_an_answer_is_the_greedy_continuation_of_the_training_prompt_and_stops_at_eos(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = with_template(trained_adapter("llama", model_dirs, tmp_path / "adapter", scale=0.5))
    main(["generate", "--adapter", str(adapter), "--prompt", "Repeat.", "--input", "word2", "--max_new_tokens", "40"])
    shown = answers_in(capfd.readouterr().out)["base"]

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    text = render_prompt("Repeat.", tokenizer, "word2")
    assert "### Input:\nword2\n\n### Response:" in text
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    expected: list[int] = []
    for _ in range(40):
        with torch.no_grad():
            token = int(
                model(input_ids=torch.cat([ids, torch.tensor([expected], dtype=torch.long)], 1)).logits[0, -1].argmax()
            )
        if token == tokenizer.eos_token_id:
            break
        expected.append(token)
    assert shown == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_merge_says_how_far_the_reloaded_model_is(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = trained_adapter("gpt2", model_dirs, tmp_path / "adapter")
    main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    assert "reloaded: logits differ" in capfd.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
