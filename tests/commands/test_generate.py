"""`plainlora generate` and `plainlora merge` as typed, and what they and the recipe ask with."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import processors
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from plainlora import load_adapter
from plainlora.commands import main
from plainlora.data.encoding import encode_rows
from plainlora.data.prompts import install_template, render_prompt
from plainlora.generation import ExactMatch, generate
from tests.conftest import make_model
from tests.lora.oracle import save_peft_adapter
from tests.merging.test_merge import quantized_run, trained_adapter
from tests.refusals import Run
from tests.test_prediction import make_classifier


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


def test_several_adapters_answer_on_one_base_as_each_does_alone(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different ranks, targets and templates; one has biases and a module trained whole."""
    settings: list[dict[str, Any]] = [
        {},
        {"r": 2, "target_modules": ["c_attn"], "use_rslora": True, "bias": "all", "modules_to_save": ["lm_head"]},
        {"target_modules": ["mlp.c_fc"], "rank_pattern": {"0..*": 7}},
    ]
    adapters = [
        save_peft_adapter(tmp_path / f"adapter{number}", model_dirs["gpt2"], "gpt2", **each)
        for number, each in enumerate(settings)
    ]
    with_template(Path(adapters[2]))
    command = ["generate", "--prompt", "Name it.", "--prompt", "Repeat.", "--max_new_tokens", "9", "--adapter"]
    alone, heads = {}, []
    for adapter in adapters:
        main([*command, adapter])
        first, second = capfd.readouterr().out.split("\nRepeat.\n")
        alone[adapter] = [answers_in(part)["tuned"] for part in (first, second)]
        heads.append(answers_in(first)["base"])
    read: list[str] = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **rest: (read.append(name), load(name, **rest))[1]
    )
    main([*command, *adapters])
    shown = capfd.readouterr()
    assert read == [str(model_dirs["gpt2"])]
    together = [answers_in(part) for part in shown.out.split("\nRepeat.\n")]
    assert list(together[0]) == ["base", *adapters]
    for adapter in adapters:
        assert [each[adapter] for each in together] == alone[adapter]
    assert len({texts[0] for texts in alone.values()}) == 3
    assert together[0]["base"] == heads[0] != heads[2]
    said = (
        f"warning: {adapters[2]} renders prompts otherwise than {adapters[0]}; the base answers those of {adapters[0]}"
    )
    assert shown.err.splitlines()[-1] == said

    main([*command, *adapters[::-1], "--with_peft"])
    other_way = answers_in(capfd.readouterr().out.split("\nRepeat.\n")[0])
    for adapter in adapters:
        assert other_way[adapter] == other_way[f"{adapter}, by PEFT"] == alone[adapter][0]


def test_several_adapters_of_quantised_runs_answer_on_what_training_saw(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapters = [str(with_template(quantized_run(model_dirs, tmp_path / name))) for name in ("one", "two")]
    command = ["generate", "--prompt", "Name it.", "--max_new_tokens", "4", "--adapter"]
    alone = {}
    for adapter in adapters:
        main([*command, adapter])
        alone[adapter] = re.findall(r"nats a token: ([\d.]+ here, [\d.]+) on the", capfd.readouterr().out)
    main([*command, *adapters])
    shown = capfd.readouterr().out
    for adapter in adapters:
        found = re.findall(
            rf"loss of the {adapter} answers, in nats a token: ([\d.]+ here, [\d.]+) on the quant", shown
        )
        assert found == alone[adapter]
        assert len(found) == 1
    main([*command, *adapters, "--base", "dequantized"])
    assert list(answers_in(capfd.readouterr().out)) == ["base", *adapters]


def test_adapters_that_share_no_base_are_refused(
    plainlora: Run, tmp_path: Path, model_dirs: dict[str, Path], backbone_dirs: dict[str, Path], word_tokenizer: Any
) -> None:
    one = save_peft_adapter(tmp_path / "one", model_dirs["llama"])
    other = save_peft_adapter(tmp_path / "other", model_dirs["gpt2"], "gpt2")
    classifier = make_classifier(tmp_path / "classifier", backbone_dirs["distilbert"], word_tokenizer)
    for adapters, said in (
        ((one, other), "other was trained on"),
        ((one, classifier), "classifier is a classifier's; use plainlora predict"),
        ((one, model_dirs["llama"]), "is a whole model, not an adapter"),
        ((one, one), "one is given twice"),
        ((one, tmp_path / "gone"), "gone does not exist, so it has no adapter_config.json"),
    ):
        assert said in plainlora("generate", "--prompt", "hi", "--adapter", *adapters)
    said = plainlora("generate", "--prompt", "hi", "--adapter", one, other, "--base_model", model_dirs["llama"])
    assert said.startswith(f"error: {other}: target_modules: none of ")


HINT = "for what training saw of it: --base dequantized"


def test_u03_an_adapter_of_a_quantised_run_can_answer_on_what_training_saw(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = with_template(quantized_run(model_dirs, tmp_path / "adapter"))
    command = ["generate", "--adapter", str(adapter), "--prompt", "Name it.", "--max_new_tokens", "40"]
    main(command)
    original = capfd.readouterr().out
    assert original.splitlines()[0].startswith("trained on quantised weights")
    assert original.splitlines()[0].endswith(HINT)
    losses = re.findall(r"loss of the tuned answers, in nats a token: ([\d.]+) here, ([\d.]+) on the quant", original)
    assert len(set(losses[0])) == 2
    main([*command, "--base", "dequantized"])
    dequantized = capfd.readouterr().out
    assert "quantised weights" not in dequantized

    main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged"), "--base", "dequantized"])
    tokenizer, merged = (
        AutoTokenizer.from_pretrained(adapter),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    )
    expected = generate(merged, tokenizer, [render_prompt("Name it.", tokenizer)], 40)
    assert [answers_in(dequantized)["tuned"]] == expected
    assert answers_in(dequantized)["tuned"] != answers_in(original)["tuned"]


def test_u15_an_adapter_without_effect_is_said_to_be_one(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for scale, said in ((0.0, True), (0.05, False)):
        adapter = trained_adapter("llama", model_dirs, tmp_path / f"adapter{scale}", scale)
        main(["generate", "--adapter", str(adapter), "--prompt", "Name it.", "--max_new_tokens", "2"])
        warning = f"warning: the adapter in {adapter} changes no logit of these prompts"
        assert (warning in capfd.readouterr().err) == said


@pytest.mark.parametrize("marker", ["certificate.json", "config.json"])
def test_a_whole_model_is_not_taken_for_an_adapter(
    tmp_path: Path, marker: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / marker).write_text("{}")
    with pytest.raises(SystemExit) as raised:
        main(["generate", "--adapter", str(tmp_path), "--prompt", "a"])
    assert raised.value.code == 2
    assert f"{tmp_path} is a whole model, not an adapter; give it as --model {tmp_path}" in capfd.readouterr().err


def by_peft(model: PreTrainedModel, adapter: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, str(adapter))


@pytest.mark.parametrize("load", [load_adapter, by_peft])
def test_an_answer_stops_at_every_eos_of_the_model_and_at_the_tokenizers(
    load: Any, tmp_path: Path, model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    adapter = trained_adapter("llama", model_dirs, tmp_path / "adapter", scale=0.5)
    model = load(make_model("llama"), adapter)
    prompts = ["Say the number after 1.", "Repeat"]

    def answers(eos: int | list[int] | None, tokenizer: PreTrainedTokenizerFast = tokenizer) -> list[str]:
        model.generation_config.eos_token_id = eos
        return [generate(model, tokenizer, [prompt], 12)[0] for prompt in prompts]

    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        first = int(model(input_ids=ids).logits[0, -1].argmax())
    assert first != tokenizer.eos_token_id
    whole = answers(None)
    assert len(whole[0]) > len(tokenizer.decode([first]).strip())
    for eos in (first, [first], [tokenizer.eos_token_id, first]):
        assert answers(eos)[0] == tokenizer.decode([first]).strip()
    own = copy.deepcopy(tokenizer)
    own.eos_token = tokenizer.convert_ids_to_tokens(first)
    assert answers([0], own)[0] == ""  # now a special token, so not shown


@pytest.mark.parametrize("bos", [False, True])
def test_rows_of_two_texts_are_asked_with_the_very_text_that_trained(
    bos: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = copy.deepcopy(tokenizer)
    install_template(own, "alpaca")  # such rows pass it by
    if bos:
        own.add_special_tokens({"bos_token": "<s>"})
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
        )
    rows = Dataset.from_list(
        [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": " Name:\n", "completion": "Ann <|endoftext|>"}]
    )
    asked = ExactMatch(rows, 2, own)
    assert asked.questions == ["2 + 2 =", " Name:\n"]
    assert asked.expected == ["4", "Ann"]
    encoded, _ = encode_rows(
        rows, own, where="rows", text_column="text", answers_only=True, max_length=None, on_overflow="drop",
        max_truncated=0.0,
    )  # fmt: skip
    for prompt, row in zip(asked.prompts, encoded, strict=True):
        ids = own(prompt, add_special_tokens=False).input_ids
        assert row["input_ids"][: len(ids)] == ids
        assert row["labels"][: len(ids)] == [-100] * len(ids)
        assert row["labels"][len(ids)] != -100
