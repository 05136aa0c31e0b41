"""What a run leaves for people says what happened."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from trl import ModelConfig, ScriptArguments, SFTConfig

from plainlora.hub.model_card import write_sft_card
from plainlora.plots import plot_loss
from plainlora.report import describe_samples, package_versions
from plainlora.settings.arguments import SFTArguments
from plainlora.settings.programs import Settings
from plainlora.tasks.summary import classifier_summary, summary

TRAIN = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
EVAL = [{"step": 2, "eval_loss": 2.5}]
RESULTS = {"method": "lora", "trainable_params": 1200, "total_params": 120000}


def arguments(folder: Path, **options: Any) -> tuple[SFTArguments, ScriptArguments, SFTConfig, ModelConfig]:
    """The four real dataclasses; an option goes to the one that knows it."""
    given: list[dict[str, Any]] = [
        {},
        {"dataset_name": "vicgalle/alpaca-gpt4"},
        {"use_cpu": True, "bf16": False, "report_to": "none", "output_dir": str(folder)},
        {"model_name_or_path": "openai-community/gpt2"},
    ]
    kinds = (SFTArguments, ScriptArguments, SFTConfig, ModelConfig)
    for name, value in options.items():
        next(at for kind, at in zip(kinds, given, strict=True) if name in kind.__dataclass_fields__)[name] = value
    return tuple(kind(**values) for kind, values in zip(kinds, given, strict=True))  # type: ignore[return-value]


def card(folder: Path, template: bool = True, **options: Any) -> ModelCard:
    if template:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    LoraConfig(r=16, target_modules=["c_attn"]).save_pretrained(folder)
    write_sft_card(folder, Settings(*arguments(folder, **options)), {"eval_loss_adapter": 1.5, **RESULTS})
    return ModelCard.load(folder / "README.md")


def test_the_metadata_is_the_hubs(tmp_path: Path) -> None:
    data = card(tmp_path).data
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == "openai-community/gpt2"
    assert data.datasets == ["vicgalle/alpaca-gpt4"]
    assert "lora" in data.tags


def test_the_card_loads_the_revision_of_the_base_that_was_trained(tmp_path: Path) -> None:
    text = card(tmp_path, model_revision="v2").text
    assert text.count('from_pretrained("openai-community/gpt2", revision="v2")') == 2
    assert "revision" not in card(tmp_path).text


def test_no_path_is_given_for_a_hub_id(tmp_path: Path) -> None:
    data = card(tmp_path, model_name_or_path=str(tmp_path), dataset_name="./rows.jsonl").data
    assert data.base_model is None
    assert data.datasets is None


@pytest.mark.parametrize(
    ("options", "row", "absent"),
    [
        ({"load_in_8bit": True}, "| base weights | 8-bit |", "float32"),
        ({"load_in_4bit": True}, "| base weights | 4-bit nf4 |", "float32"),
        ({"dtype": "bfloat16"}, "| base weights | bfloat16 |", "float32"),
        ({}, "| packing | no |", "packing | 0"),
        ({"packing": True}, "| packing | yes |", "packing | 1"),
        ({}, "| epochs | 3 |", "| steps |"),
        ({"max_steps": 1500}, "| steps | 1,500 |", "| epochs |"),
    ],
)
def test_the_settings_are_those_of_the_run(tmp_path: Path, options: dict[str, Any], row: str, absent: str) -> None:
    text = card(tmp_path, **options).text
    assert row in text
    assert absent not in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "rendered by the base tokenizer's own template (`chat_template.jinja`)."),
        ({"prompt_template": "alpaca"}, "rendered by the template `alpaca` (`chat_template.jinja`)."),
        ({"chat_template_path": "my.jinja"}, "rendered by the template `my.jinja` (`chat_template.jinja`)."),
    ],
)
def test_the_template_is_the_one_that_was_installed(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    assert f"\nConversations are {sentence}\n" in card(tmp_path, **options).text


def test_a_template_that_is_not_there_is_not_claimed(tmp_path: Path) -> None:
    text = card(tmp_path, template=False).text
    assert "\nPrompts are plain text: its tokenizer has no chat template.\n" in text
    assert "chat_template.jinja" not in text


@pytest.mark.parametrize(("history", "base"), [([], None), (TRAIN, None), ([*TRAIN, *EVAL], 3.5)])
def test_the_loss_is_drawn_whatever_was_measured(
    tmp_path: Path, history: list[dict[str, Any]], base: float | None
) -> None:
    plot_loss(history, base, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def answers_of(text: str) -> list[tuple[str, str]]:
    """Base's and adapter's answers, read back from the cells and fences around them."""
    cell = r"<td>\n\n(`{3,})text\n(.*?)\n\%d\n\n</td>"
    pairs = re.findall(rf"<tr>{cell % 1}\n{cell % 3}\n</tr>", text, flags=re.DOTALL)
    return [(base, adapter) for _, base, _, adapter in pairs]


def test_sample_answers_stand_whole_in_the_card_whatever_is_in_them(tmp_path: Path) -> None:
    long = "word " * 300 + "end"
    samples = [
        ("Name a colour.", long, "Red.\n\n    indented\n| a | b |"),
        ("Write code.", "```python\nprint('cut off", "</td></tr> & ---\n````\nfour\n````"),
        ("Say nothing.", "", "<|im_end|>"),
    ]
    LoraConfig(target_modules=["c_attn"]).save_pretrained(tmp_path)
    expected = [(base, adapter) for _, base, adapter in samples]
    assert answers_of(describe_samples(samples)) == expected
    write_sft_card(tmp_path, Settings(*arguments(tmp_path)), RESULTS, samples)
    text = ModelCard.load(tmp_path / "README.md").text
    assert answers_of(text) == expected
    assert text.index("## Results") < text.index("## Sample answers") < text.index("Name a colour.")
    assert text.index("<|im_end|>") < text.index("## Loading") < text.index("## Training")
    assert "Sample answers" not in card(tmp_path).text


def test_the_summary_says_where_tensorboard_finds_its_events(tmp_path: Path) -> None:
    assert "tensorboard" not in summary(RESULTS, str(tmp_path), [])
    (tmp_path / "runs").mkdir()
    assert f"tensorboard --logdir {tmp_path}/runs" in summary(RESULTS, str(tmp_path), [])


def test_a_classifiers_summary_says_what_memory_training_took(tmp_path: Path) -> None:
    results = RESULTS | {"train_runtime": 60.2, "peak_memory_bytes": 1_500_000_000, "method": "full"}
    assert "training took         60 s, at most 1.5 GB\n" in classifier_summary(results, str(tmp_path))
    results["peak_memory_reserved_bytes"] = 2_100_000_000
    assert ", at most 1.5 GB (2.1 GB reserved)\n" in classifier_summary(results, str(tmp_path))


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plainlora.report.PACKAGES", ("torch", "not-installed-anywhere"))
    assert package_versions() == {"torch": version("torch")}
