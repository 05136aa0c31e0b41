"""A template that takes the place of an instruct model's own is said, by the doctor and by the run."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plainlora.commands import main
from plainlora.data.prompts import install_template
from plainlora.doctor.finding import Examination, Finding
from plainlora.doctor.tokens import examine_template
from tests.conftest import ROOT
from tests.recipes.conftest import RunSFT, run_sft  # noqa: F401  # a fixture

OTHER = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
STRICT = "{{ raise_exception('tools first') }}"
LLAMA2 = (  # what the built-in one of this name renders, in other words
    "{% for m in messages %}{% if loop.index0 % 2 == 0 %}[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def look(
    tokenizer: PreTrainedTokenizerFast, own: str | dict[str, str] | None, template: str | None = "llama2"
) -> list[Finding]:
    changed, examination = copy.deepcopy(tokenizer), Examination()
    changed.chat_template = own
    install_template(changed, template)
    examine_template(changed, template, own, examination)
    return examination.findings


def test_a_template_that_renders_otherwise_than_the_models_own_is_a_warning(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for own in (OTHER, STRICT, {"default": OTHER, "rag": LLAMA2}, {"rag": LLAMA2}):
        (finding,) = look(tokenizer, own)
        assert (finding.level, finding.subject, finding.check) == ("warning", "tokenizer", "own template")
        assert finding.message.startswith("prompt_template llama2 ('[INST] Name a colour.")
    (finding,) = look(tokenizer, OTHER)
    assert "replaces the chat template of " in finding.message
    assert "('<|user|>Name a colour" in finding.message
    for own in (LLAMA2, {"default": LLAMA2, "rag": OTHER}):
        (finding,) = look(tokenizer, own)
        assert finding.level == "ok"
    assert look(tokenizer, None) == []  # a base that was never taught a format
    assert look(tokenizer, OTHER, None) == []


def test_the_run_and_the_doctor_name_the_template_and_the_model_whose_own_it_replaces(
    run_sft: RunSFT,  # noqa: F811
    model_dirs: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    base = shutil.copytree(model_dirs["gpt2"], tmp_path / "base")
    instruct = AutoTokenizer.from_pretrained(base)
    instruct.chat_template = OTHER
    instruct.save_pretrained(base)
    flags = ["--model_name_or_path", str(base), "--max_steps", "2", "--eval_strategy", "no"]

    run_sft("gpt2", "replaced", *flags)
    (said,) = [line for line in capfd.readouterr().out.splitlines() if "replaces the chat template" in line]
    assert said.startswith("warning: tokenizer: prompt_template alpaca ('Below is an instruction")
    assert f"replaces the chat template of {base} ('<|user|>Name a colour" in said
    run_sft("gpt2", "kept", *flags, config="recipes/instruct/lora.yaml")
    assert "replaces the chat template" not in capfd.readouterr().out

    recipe = ROOT / "recipes/gpt2-alpaca-gpt4/lora.yaml"
    flags += ["--dataset_name", str(rows_file), "--test_split_size", "8", "--max_length", "256"]
    main(["doctor", "--config", str(recipe), "--json", "--", *flags, "--output_dir", str(tmp_path / "new")])
    found = json.loads(capfd.readouterr().out)["findings"]
    (finding,) = [one for one in found if one["check"] == "own template"]
    assert said == f"warning: tokenizer: {finding['message']}"
    assert finding["level"] == "warning"
