"""All that is wrong with the settings is told at once, before anything is read."""

from pathlib import Path

import pytest

from plainlora.errors import UserError
from plainlora.settings.programs import CLASSIFY, SFT, Program, find_program
from tests.conftest import ROOT

BASE = {SFT: "", CLASSIFY: "lora_query: true\n"}


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def faults(program: Program, text: str, *flags: str) -> list[str]:
    """Every line that the program would write on standard error."""
    content = f"model_name_or_path: m\ndataset_name: d\noutput_dir: out\n{BASE[program]}{text}"
    Path("recipe.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        program.parse(["--config", "recipe.yaml", *flags])
    assert str(raised.value) == "\n".join(map(str, raised.value.args))
    return [str(fault) for fault in raised.value.args]


def test_u22_names_values_and_contradictions_are_told_together() -> None:
    found = faults(
        SFT,
        "max_seq_length: 64\nlearing_rate: 1.0\nseed: soon\nload_in_4bit: true\nload_in_8bit: true\n"
        "lora_config: {use_dra: true}\npacking: true\npacking_strategy: wrapped\n",
        *("--lora_rnk", "4", "--attn_implementation", "quick"),
    )
    expected = (
        "recipe.yaml: max_seq_length is not an option; did you mean max_length?",
        "recipe.yaml: learing_rate is not an option; did you mean learning_rate?",
        "recipe.yaml: argument --seed: invalid int value: 'soon'",
        "--lora_rnk is not an option; did you mean lora_r?",
        "You can't use 8 bit and 4 bit precision at the same time",
        "lora_config: 'use_dra' is not a field of peft.LoraConfig that a recipe can set; did you mean use_dora?",
        "attn_implementation 'quick' cannot be used here (",
        "packing_strategy=wrapped is refused",
    )
    assert [fault for fault in found if not fault.startswith(expected)] == []
    assert len(found) == len(expected)


@pytest.mark.parametrize("program", [SFT, CLASSIFY], ids=["sft", "classify"])
@pytest.mark.parametrize(
    "line",
    [
        *("loraplus_lr_ratio: 16", "lora_config: {use_rslora: true}", "adapter_name_or_path: a"),
        *("use_dora: true", "use_rslora: true"),
    ],
)
@pytest.mark.parametrize("method", ["full", "last_layers"])
def test_what_is_for_an_adapter_is_refused_where_none_is_trained(program: Program, line: str, method: str) -> None:
    (fault,) = faults(program, f"method: {method}\n{line}\n")
    assert fault == f"{line.partition(':')[0]} is for an adapter, and method {method} trains none; leave it out"


@pytest.mark.parametrize("program", [SFT, CLASSIFY], ids=["sft", "classify"])
@pytest.mark.parametrize("line", ["lora_target_parameters: [a.b]", "lora_config: {init_lora_weights: pissa}"])
def test_what_peft_alone_implements_is_refused_for_the_hand_written_form_alone(program: Program, line: str) -> None:
    (fault,) = faults(program, f"lora_backend: reference\n{line}\n")
    assert fault.startswith("lora_backend reference does not implement ")
    for backend in ("fused", "peft", "peft_fused"):
        content = f"model_name_or_path: m\ndataset_name: d\noutput_dir: out\n{BASE[program]}"
        Path("recipe.yaml").write_text(f"{content}lora_backend: {backend}\n{line}\n", encoding="utf-8")
        program.parse(["--config", "recipe.yaml"])


@pytest.mark.parametrize("program", [SFT, CLASSIFY], ids=["sft", "classify"])
@pytest.mark.parametrize("backend", ["fused", "reference", "peft"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "lora_config: {use_dra: true}",
            "lora_config: 'use_dra' is not a field of peft.LoraConfig that a recipe can set; did",
        ),
        (
            "lora_config: {peft_type: IA3}",
            "lora_config: 'peft_type' is not a field of peft.LoraConfig that a recipe can set",
        ),
        ("lora_config: {r: 4}\nlora_r: 8", "lora_config: r is 4, but lora_r is 8 (recipe.yaml); give only one"),
        ("lora_config: {eva_config: {}}", "lora_config: `eva_config` specified but will be ignored"),
        (
            "lora_config: {eva_config: {rho: 0}, init_lora_weights: eva}",
            "lora_config: PEFT refuses it: `rho` must be >=",
        ),
        ("lora_config: {lora_dropout: 2}", "lora_dropout must lie in [0, 1), not 2"),
        ("lora_config: [1]", "lora_config takes one value, not a list"),
        ("loraplus_lr_ratio: 0.5", "loraplus_lr_ratio must be at least 1, not 0.5"),
        ("lora_r: 0", "r must be a whole number of at least 1, not 0"),
        ("lora_r: 9999999", "r is 9,999,999, more than any layer is wide"),
        ("lora_dropout: 1.0", "lora_dropout must lie in [0, 1), not 1.0"),
        ("lora_exclude_modules: ['(']\nlora_modules_to_save: ['(']", "modules_to_save: '(' is not a regular expr"),
        ("lora_rank_pattern: {'(': 4}", "rank_pattern: '(' is not a regular expression"),
        ("optim: nonsense", "argument --optim: invalid"),
        ("lora_task_type: TOKEN_CLS", "lora_task_type TOKEN_CLS: this program"),
        ("lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_type cosine_with_min_lr: "),
        ("attn_implementation: quick", "attn_implementation 'quick' cannot be used here"),
    ],
)
def test_no_back_end_begins_with_what_its_adapter_cannot_be(
    program: Program, backend: str, line: str, said: str
) -> None:
    (fault,) = faults(program, f"lora_backend: {backend}\n{line}\n")
    assert said in fault


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("padding_free: true\n", "padding_free without packing enforces no max_length"),
        (
            "gradient_checkpointing_kwargs: {selective: true}\ngradient_checkpointing: false\n",
            "selective needs gradient_checkpointing",
        ),
        (
            "gradient_checkpointing_kwargs: {selective: true, use_reentrant: true}\n",
            "selective needs use_reentrant to be false",
        ),
        ("model_init_kwargs: {dtype: float16}\n", "model_init_kwargs: dtype has a flag of its own; set that"),
        ("model_init_kwargs: {use_safetensors: false}\n", "model_init_kwargs: use_safetensors is always true"),
        (
            "lora_layers_to_transform: [1]\nlora_target_modules: all-linear\n",
            "lora_layers_to_transform needs names of modules, not the pattern",
        ),
    ],
)
def test_what_only_the_trainer_or_loading_would_refuse_is_told_from_the_settings(text: str, said: str) -> None:
    (fault,) = faults(SFT, text)
    assert said in fault


@pytest.mark.parametrize("words", [["--dataset_name", "d", "stray"], ["--dataset-name"]])
def test_a_setting_that_cannot_be_read_is_not_missing_beside(words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        SFT.parse(["--model_name_or_path", "m", "--output_dir", "out", *words])
    (fault,) = raised.value.args
    assert "stray is not an option" in str(fault) or "expected one argument" in str(fault)


def test_every_recipe_has_nothing_wrong() -> None:
    recipes = sorted(ROOT.glob("recipes/*/*.yaml"))
    assert len(recipes) >= 9
    for path in recipes:
        find_program(str(path)).parse(["--config", str(path), "--output_dir", "out"])
