"""The tables of features name commands and settings that are read, and tests that exist."""

import ast
import inspect
import re
import shlex
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import peft.optimizers
import pytest
from peft import LoraConfig
from peft.utils import hotswap
from trl import ModelConfig, ScriptArguments

import plainlora
from plainlora.commands import build_parser
from plainlora.errors import UserError
from plainlora.settings.adapter import adapter_faults
from plainlora.settings.arguments import ClassifyArguments, ClassifyConfig, SFTArguments, SFTRecipeConfig
from plainlora.settings.parsing import StrictParser
from plainlora.settings.programs import CLASSIFY, SFT
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")


def rows_of(text: str) -> list[list[str]]:
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if line[0].strip() != "feature"]


OF_THE_FIELD, OF_OUR_OWN = map(rows_of, PAGE.split("## What none of the nine has"))
ROWS = [*OF_THE_FIELD, *OF_OUR_OWN]

# Every feature that at least one of the nine has, and the rows that answer it.
FIELD = {
    "r, alpha": ["r, alpha"],
    "dropout": ["dropout"],
    "rsLoRA": ["rsLoRA"],
    "DoRA": ["DoRA"],
    "PiSSA/OLoRA/orthogonal/MiCA init": ["PiSSA, OLoRA, orthogonal, MiCA"],
    "EVA/CorDA/LoRA-GA": ["EVA, CorDA, LoRA-GA"],
    "LoftQ": ["LoftQ"],
    "rank/alpha_pattern": ["rank and alpha patterns"],
    "all-linear": ["all-linear"],
    "regex targets": ["regular expressions as targets"],
    "exclude_modules": ["exclude_modules"],
    "layers_to_transform": ["layers_to_transform", "layers_pattern"],
    "modules_to_save": ["modules_to_save"],
    "bias options": ["biases"],
    "Conv1D": ["Conv1D"],
    "Embedding, Conv2d": ["embeddings, convolutions"],
    "tied weights": ["tied weights"],
    "many adapters, weighted sum, hotswap": ["several adapters", "weighted sums", "hot swapping"],
    "merge": ["merge"],
    "unmerge, safe_merge": ["unmerge", "safe_merge"],
    "write PEFT format": ["write PEFT's files"],
    "read PEFT format": ["read PEFT's files"],
    "NF4 base": ["NF4"],
    "8-bit base": ["8 bits"],
    "FSDP/ZeRO-3": ["FSDP2, ZeRO-2, ZeRO-3"],
    "LoRA+": ["LoRA+"],
    "LoRA-FA": ["LoRA-FA"],
    "YAML + CLI override": ["YAML and command line"],
    "unknown keys rejected": ["unknown keys refused"],
    "isolated packing": ["isolated packing"],
    "completion/assistant loss": ["loss on answers"],
    "chat template control": ["chat templates"],
    "eval in training": ["evaluation in training"],
    "early stopping": ["early stopping"],
    "sweep": ["sweep"],
    "full fine-tune": ["full fine-tuning"],
    "last-layers baseline": ["last layers"],
    "resume": ["resume"],
    "survives a broken newest checkpoint": ["survives a broken newest checkpoint"],
    "export safetensors": ["safetensors alone"],
    "GGUF": ["GGUF"],
    "Hub push + card": ["push with a card"],
    "trackio/tensorboard/wandb": ["trackers"],
    "plots": ["plots"],
    "samples during/after training": ["samples after and during training"],
    "memory estimate first": ["memory before the start"],
    "dry run": ["dry run"],
    "overflow/length policy or report": ["rows that are too long"],
    "equality test vs PEFT": ["equality with PEFT"],
    "merged = adapter check": ["the merged model is the adapter model"],
}
OF_NONE = {  # what was found in none of the nine, by the beginnings of the rows that answer it
    "proof of equality, for users": ["proof of equality with PEFT"],
    "two-way files": ["files from here to PEFT and back"],
    "merge certificate": ["a certificate beside every merge"],
    "doctor before weights load": ["what would go wrong"],
    "bit-exact crash test": ["kills at any moment", "kills of either of two processes"],
    "preflight from config only": ["memory, parameters and disk"],
    "first-step assertion": ["every adapter gets a gradient"],
    "one table": ["LoRA, last layers and full in one table"],
    "run manifest, reproduce": ["a record of each run", "a run made again"],
    "config migration": ["stale settings told"],
    "QLoRA tested on CPU": ["QLoRA tested without a GPU"],
}


def name_of(row: list[str]) -> str:
    """The feature, without the number of its note."""
    return re.sub(r" \(\d+\)$", "", row[0])


def test_every_feature_of_the_field_and_of_none_has_a_row() -> None:
    assert (len(FIELD), len(OF_NONE)) == (50, 11)
    names = [name_of(row) for row in OF_THE_FIELD]
    answered = [name for rows in FIELD.values() for name in rows]
    assert Counter(names) == Counter([*answered, "chat in the terminal", "a page to try it on"])
    own = [name_of(row) for row in OF_OUR_OWN]
    for beginnings in OF_NONE.values():
        for beginning in beginnings:
            assert len([name for name in own if name.startswith(beginning)]) == 1, beginning
    assert len(set(own)) == len(own) == 18


def test_every_note_is_named_once_and_is_there() -> None:
    found = []
    for section in PAGE.split("\n##")[1:]:
        named = [int(number) for row in rows_of(section) for number in re.findall(r" \((\d+)\)$", row[0])]
        assert named == [int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)]
        assert named == [*range(1, len(named) + 1)]
        found.append(len(named))
    assert found == [0, 6, 2, 4, 1, 0]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def flags() -> frozenset[str]:
    owners = [owner for program in (SFT, CLASSIFY) for owner in program.dataclass_types]
    return frozenset(field.name for owner in owners for field in fields(owner))


@cache
def words_known() -> frozenset[str]:
    """What stands alone: a value of `init_lora_weights`, a name of PEFT's, a package."""
    inits = {name for kind in get_args(get_type_hints(LoraConfig)["init_lora_weights"]) for name in get_args(kind)}
    functions = {name for module in (peft.optimizers, hotswap) for name, _ in inspect.getmembers(module)}
    return frozenset({*inits, "lora_ga", *functions})


def check_recipe_flags(words: list[str]) -> None:
    """Parses the flags as a program does, and makes the `LoraConfig` that they describe."""
    words = [word for word in words if word not in ("--config", "R.yaml")]
    try:
        parser = StrictParser((SFTArguments, ScriptArguments, SFTRecipeConfig, ModelConfig))
        recipe, *_, model = parser.parse(["--use_cpu", "true", "--bf16", "false", *words])
    except UserError:
        StrictParser((ClassifyArguments, ScriptArguments, ClassifyConfig, ModelConfig)).parse(words)
    else:
        assert list(adapter_faults(model, recipe)) == []


@cache
def artefacts() -> frozenset[str]:
    """Names of files in the package's code."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    return frozenset(name for text in texts for name in re.findall(r'"(\w+\.(?:png|json))"', text))


def check_span(span: str) -> str:
    """Which kind of thing it is; raises if it is of no kind, or would be refused."""
    words = shlex.split(span)
    if words[0] == "plainlora":
        parsed = build_parser().parse_args(words[1:])
        check_recipe_flags(getattr(parsed, "flags", None) or [])
        return "command"
    if words[:2] == ["accelerate", "launch"] or words[:2] in (
        ["python", "recipes/sft.py"],
        ["python", "recipes/classify.py"],
    ):
        assert all((ROOT / word).is_file() for word in words if "/" in word)
        program = next(number for number, word in enumerate(words) if word.endswith(".py"))
        rest = [word for word in words[program + 1 :] if not word.startswith("recipes/")]
        check_recipe_flags(rest)
        return "launch"
    if words[0].startswith("--"):
        check_recipe_flags(words)
        return "flag"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        return "make"
    if words[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
        return "make"
    if function := re.fullmatch(r"plainlora\.(\w+)\(.*\)", span):
        assert function[1] in plainlora.__all__
        return "function"
    if span.endswith(".yaml"):
        assert (ROOT / "accelerate_configs" / span).is_file()
        return "file"
    if span.endswith((".png", ".json")):
        assert span in artefacts()
        return "file"
    assert span in words_known(), f"`{span}` is no command, flag, file or name"
    return "word"


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_a_row_says_to_type_is_read(row: list[str]) -> None:
    assert len(row) == 3
    kinds = [check_span(span) for span in spans(row[1])]
    assert kinds or row[1].startswith("every ")


def test_what_is_typed_is_of_these_kinds() -> None:
    kinds = Counter(check_span(span) for row in ROWS for span in spans(row[1]))
    counted = {"flag": 43, "command": 26, "function": 7, "word": 6, "launch": 3, "file": 6, "make": 2}
    assert kinds == counted, "the page changed: count again"


@pytest.mark.parametrize(
    "wrong",
    [
        "plainlora merge --adaptor A --output D", "plainlora mend --adapter A", "--lora_rank 4", "--lora_r four",
        "plainlora doctor --config R.yaml -- --lora_rank 4", "--lora_config '{\"init_lora_weight\": \"eva\"}'",
        "--lora_config '{\"init_lora_weights\": \"evil\"}'", "python recipes/sft.py --config recipes/none.yaml",
        "accelerate launch --config_file accelerate_configs/none.yaml recipes/sft.py", "make coffee", "win.png",
        "python -m tests.engines.none", "plainlora.unmerge(model)", "none.yaml", "mocha",
    ],
)  # fmt: skip
def test_what_would_not_be_read_is_found(wrong: str) -> None:
    with pytest.raises((AssertionError, UserError)):
        check_span(wrong)


def decorated_slow(path: Path, function: str | None) -> bool:
    """Whether `make test-all` leaves out the file, or the function of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    whole = [node for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
    if any("mark.slow" in ast.unparse(node) for node in whole):
        return True
    if function is None:
        return False
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return any(ast.unparse(decorator) == "pytest.mark.slow" for decorator in found.decorator_list)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_tests_of_a_row_are_there_and_slow_ones_say_so(row: list[str]) -> None:
    cited = [span for span in spans(row[2]) if span.startswith("tests/")]
    assert cited
    slow = []
    for span in cited:
        name, _, function = span.partition("::")
        assert (ROOT / name).is_file()
        if function:
            assert re.search(rf"^def {function}\(", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        slow.append(decorated_slow(ROOT / name, function or None))
    assert any(slow) == ("`make test-slow`" in row[2])
    assert {span for span in spans(row[2]) if not span.startswith("tests/")} <= {"make test-slow", "make llama-cpp"}


def test_the_notes_name_flags_and_commands_that_are_read() -> None:
    notes = "\n".join(re.findall(r"^\d+\. .*(?:\n   .*)*", PAGE, re.MULTILINE))
    typed = [span for span in spans(notes) if span.startswith(("--", "plainlora", "make"))]
    own = ["--quantize", "--run_name"]  # without a value: the first is of a command
    assert [check_span(span) for span in typed if span not in own] == ["flag"] * 2 + ["make"] + ["command"] * 3
    assert "run_name" in flags()
