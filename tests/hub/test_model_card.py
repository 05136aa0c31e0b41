"""What a model card says is so, and its code runs as it stands there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import ModelConfig, ScriptArguments, SFTConfig

from plainlora import inject
from plainlora.base.classifier import classifier_config
from plainlora.hub.model_card import HERE, plain_card, write_classifier_card, write_sft_card
from plainlora.hub.publication import collect_publication
from plainlora.lora.interchange import save_adapter
from plainlora.merging.merge import merge_adapter
from plainlora.settings.arguments import ClassifyArguments, ClassifyConfig, SFTArguments
from plainlora.settings.programs import Settings
from tests.conftest import make_model, random_ids
from tests.recipes.conftest import RunClassify, RunSFT, run_classify, run_sft  # noqa: F401  # fixtures

LOCAL = "PATH OF THIS ADAPTER"
RESULTS: dict[str, Any] = {
    "train_loss": 2.5, "train_runtime": 44.6, "train_samples_per_second": 96.5, "train_steps_per_second": 6.0,
    "total_flos": 2121833615360.0, "epoch": 2.0, "eval_loss_base": 3.6, "eval_loss_adapter": 0.045,
    "eval_perplexity_adapter": 1.05, "exact_match_base": 0.0, "exact_match_adapter": 0.988, "exact_match_rows": 85,
    "merge_max_abs_diff": 2.9e-05, "merge_relative_diff": 7.1e-07, "merge_tolerance": 1e-05,
    "trainable_params": 1200, "total_params": 120000, "peak_memory_bytes": 1654730752,
    "rows_trained": 2100, "rows_read": 2155,
}  # fmt: skip


def code_of(card: str, folder: Path) -> list[str]:
    """The card's Python, with the folder's name where it says to put one."""
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return [block.replace(HERE, str(folder)).replace(LOCAL, str(folder)) for block in blocks]


def table(card: str, title: str) -> dict[str, str]:
    """The rows of the table below a heading."""
    body = card.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]
    return dict(re.findall(r"^\| (.+) \| (.+) \|$", body, flags=re.MULTILINE))


def results(card: str) -> list[list[str]]:
    """The rows of the results: a name, its figure before training, and after."""
    lines = (
        card.split("\n## Results\n\n|  | before | after |\n|---|---|---|\n")[1]
        .split("\n\n", maxsplit=1)[0]
        .splitlines()
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def write_card(folder: Path, base: str, results: dict[str, Any] = RESULTS, **recipe: Any) -> str:
    """The card of a language model's adapter."""
    training = SFTConfig(use_cpu=True, bf16=False, report_to="none", output_dir=str(folder))
    model = ModelConfig(model_name_or_path=base)
    settings = Settings(SFTArguments(**recipe), ScriptArguments(dataset_name="ann/rows"), training, model)
    if not (folder / "adapter_config.json").exists():
        LoraConfig(target_modules=["q_proj"]).save_pretrained(folder)
    write_sft_card(folder, settings, results)
    return (folder / "README.md").read_text()


def make_adapter(folder: Path, base: Path) -> torch.Tensor:
    """A language model's adapter on disk, and the logits of what it makes of its base."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], base_model_name_or_path=str(base))
    model = inject(make_model("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(model, folder)
    return model.eval()(input_ids=random_ids()).logits.detach()


def test_the_code_of_an_adapters_card_runs_from_top_to_bottom(
    model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expected = make_adapter(tmp_path, model_dirs["llama"])
    tokenizer.save_pretrained(tmp_path)
    blocks = code_of(write_card(tmp_path, str(model_dirs["llama"])), tmp_path)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:  # in one interpreter
        exec(block, names)
        torch.testing.assert_close(names["model"].eval()(input_ids=random_ids()).logits.detach(), expected)


def test_the_code_of_a_classifiers_card_runs(
    backbone_dirs: dict[str, Path], word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = str(backbone_dirs["distilbert"])
    config = classifier_config(base, ["ham", "spam"], word_tokenizer.pad_token_id, None)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_lin"], modules_to_save=["classifier"])
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    settings = Settings(
        ClassifyArguments(train_head=True),
        ScriptArguments(dataset_name="ann/texts"),
        ClassifyConfig(use_cpu=True, bf16=False, report_to="none", output_dir=str(tmp_path)),
        ModelConfig(model_name_or_path=base),
    )
    write_classifier_card(
        tmp_path,
        settings,
        config,
        lora,
        {"method": "lora", "labels": ["ham", "spam"], "test_accuracy": 0.9, "test_rows": 50, "rows_trained": 70}
        | {"trainable_params": 1, "total_params": 2, "peak_memory_bytes": 3},
    )
    card = (tmp_path / "README.md").read_text()
    assert results(card) == [["test_accuracy", "", "0.9"], ["test_rows", "", "50"]]
    names: dict[str, Any] = {}
    for block in code_of(card, tmp_path):
        exec(block, names)
    inputs = names["tokenizer"]("win a big prize", return_tensors="pt")
    torch.testing.assert_close(names["model"].eval()(**inputs).logits, adapted(**inputs).logits)


def test_the_code_of_the_cards_of_what_came_without_one_runs(
    model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A merged model's, which says on which text its perplexity was taken, and an adapter's of elsewhere."""
    adapter, merged, text = tmp_path / "adapter", tmp_path / "merged", tmp_path / "my story.txt"
    expected = make_adapter(adapter, model_dirs["llama"])
    tokenizer.save_pretrained(adapter)
    text.write_text("word word word\n" * 20)
    merge_adapter(adapter, merged, text=text)
    published = collect_publication(merged, "ann/llama").at(str(merged))["README.md"]
    assert isinstance(published, bytes)
    figures = table(published.decode(), "Figures")
    on = json.loads((merged / "certificate.json").read_text())["measured_on"]
    assert f"perplexity on the text my story.txt ({on['rows']} rows, {on['tokens']} tokens)" in figures
    assert "largest difference of a logit from the adapter model's on 4 prompts" in figures
    assert str(tmp_path / "my") not in "".join(figures)
    other = plain_card(adapter, "peft", "text-generation", str(model_dirs["llama"]), {})
    names: dict[str, Any] = {}
    for card, folder in ((published.decode(), merged), (other, adapter)):
        for block in code_of(card, folder):
            exec(block, names)
        model = getattr(names["model"], "model", names["model"]) if folder == merged else names["model"]
        torch.testing.assert_close(model.eval()(input_ids=random_ids()).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_results_are_those_that_tell_quality(tmp_path: Path) -> None:
    card = write_card(tmp_path, "openai-community/gpt2")
    assert results(card) == [
        ["train_loss", "", "2.5"],
        ["eval_loss", "3.6", "0.045"],
        ["eval_perplexity", "", "1.05"],
        ["exact_match", "0", "0.988"],
        ["exact_match_rows", "", "85"],
        ["logits of the merged model differ by at most", "", "2.9e-05, 7.1e-07 of the largest (allowed: 1e-05)"],
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [({"rows_trained": 2100, "rows_read": 2155}, "2,100 of 2,155 read"), ({"rows_trained": 2100}, "2,100")],
)
def test_the_card_says_of_how_many_rows_and_weights_training_made_use(
    tmp_path: Path, rows: dict[str, int], said: str
) -> None:
    results = {name: value for name, value in RESULTS.items() if not name.startswith("rows_")} | rows
    settings = table(write_card(tmp_path, "openai-community/gpt2", results), "Training")
    assert settings["rows trained on"] == said
    assert settings["trained parameters"] == "1,200 of 120,000 (1.00%)"


def test_a_picture_that_is_not_published_is_not_shown(tmp_path: Path) -> None:
    for name in ("loss.png", "passport.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    card = write_card(tmp_path, "openai-community/gpt2")
    assert "![loss](loss.png)" in card
    assert "passport" not in card


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, {}),
        ({"use_dora": True}, {"use_dora": "yes"}),
        ({"use_rslora": True, "bias": "all"}, {"use_rslora": "yes", "bias": "all"}),
        ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
        ({"init_lora_weights": False}, {"init_lora_weights": "no"}),
        ({"rank_pattern": {"q_proj": 4}}, {"rank_pattern": "{'q_proj': 4}"}),
        ({"layers_to_transform": [0, 1]}, {"layers_to_transform": "[0, 1]"}),
        ({"rank_pattern": {"q_proj" * 99: 4}}, {"rank_pattern": f"{{'{'q_proj' * 99}"[:99] + "…"}),
    ],
)
def test_the_card_names_every_field_of_the_adapter_that_is_not_the_default(
    tmp_path: Path, fields: dict[str, Any], rows: dict[str, str]
) -> None:
    LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **fields).save_pretrained(tmp_path)
    recipe = {"lora_config": fields} if "init_lora_weights" in fields else {}
    settings = table(write_card(tmp_path, "openai-community/gpt2", **recipe), "Training")
    names = list(settings)
    between = names[names.index("target modules") + 1 : names.index("base weights")]
    assert {name: settings[name] for name in between} == rows


def test_the_card_says_the_ratio_of_loraplus(tmp_path: Path) -> None:
    card = write_card(tmp_path, "openai-community/gpt2", loraplus_lr_ratio=16.0)
    assert table(card, "Training")["LoRA+ ratio"] == "16"


def test_the_card_says_what_an_adapter_was_that_is_saved_for_the_unchanged_base(
    run_sft: RunSFT,  # noqa: F811
    run_classify: RunClassify,  # noqa: F811
) -> None:
    flags = ("--lora_config", '{"init_lora_weights": "pissa", "rank_pattern": {"q_.*": 3}}', "--lora_r", "2")
    flags += ("--lora_alpha", "4", "--max_steps", "2")
    for folder in (
        run_sft("llama", "sft", *flags, "--lora_target_modules", "q_proj", "down_proj"),
        run_classify("distilbert", "texts", *flags, "--train_head", "false"),
    ):
        settings = table((folder / "README.md").read_text(), "Training")
        assert settings["init_lora_weights"] == "pissa, converted for the unchanged base"
        assert (settings["r"], settings["alpha"]) == ("4, trained as 2", "8, trained as 4")
        assert settings["rank_pattern"] == "{'q_.*': 6}, trained as {'q_.*': 3}"
