"""Every command of the README and CONTRIBUTING is checked against the real parsers, and none is missed."""

import re
import shlex
from pathlib import Path

import pytest
from trl import ModelConfig, ScriptArguments

import benchmarks.__main__
from plainlora.commands import build_parser
from plainlora.errors import UserError
from plainlora.settings.arguments import ClassifyArguments, ClassifyConfig, SFTArguments, SFTRecipeConfig
from plainlora.settings.parsing import StrictParser
from tests.conftest import ROOT, make_model, make_peft_trainer

PAGES = ("README.md", "CONTRIBUTING.md", "recipes/quickstart/README.md")
PLAIN = {"source .venv/bin/activate", ".venv/bin/pre-commit install", "python recipes/quickstart/build.py"}


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    text = "\n".join(block for page in PAGES for block in blocks("bash", page)).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def parse_recipe_flags(words: list[str], program: str) -> None:
    kinds = {"sft.py": (SFTArguments, SFTRecipeConfig), "classify.py": (ClassifyArguments, ClassifyConfig)}
    recipe, training = kinds[program]
    StrictParser((recipe, ScriptArguments, training, ModelConfig)).parse(words)


def check(command: str) -> str:
    """Which kind of command it is; raises if it is of no kind or would be refused."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), command
        for word in words[2:]:
            name, _, given = word.partition("=")
            assert (words[1], name) == ("bench", "ARGS"), command
            benchmarks.__main__.build_parser().parse_args(shlex.split(given))
        return "make"
    if words[0] == "plainlora":
        build_parser().parse_args(words[1:])
        return "plainlora"
    if words[:2] == ["accelerate", "launch"]:
        program = next(number for number, word in enumerate(words) if word.endswith(".py"))
        for word in words:
            if word.endswith((".yaml", ".py")):
                assert (ROOT / word).is_file(), command
        parse_recipe_flags(words[program + 1 :], Path(words[program]).name)
        return "launch"
    if words[0].startswith("--"):  # of either program
        try:
            parse_recipe_flags(words, "sft.py")
        except UserError:
            parse_recipe_flags(words, "classify.py")
        return "flag"
    assert " ".join(words) in PLAIN, command
    return "plain"


def test_every_command_of_the_pages_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    kinds = [check(command) for command in commands()]
    found = {kind: kinds.count(kind) for kind in kinds}
    assert found == {"make": 15, "launch": 10, "plainlora": 22, "flag": 23, "plain": 2}, "a page changed: count again"


def test_a_wrong_command_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for wrong in (
        "make coffee",
        "make bench ARGS='--suite layers'",
        "make test ARGS=-x",
        "plainlora merge --adaptor x --output y",
        "accelerate launch recipes/sft.py --config recipes/none.yaml",
        "--lora_rank 4",
        "rm -rf outputs",
    ):
        with pytest.raises(Exception):  # noqa: B017, PT011  # an assertion or a refusal, whatever the kind
            check(wrong)


def test_every_recipe_has_a_command_or_a_row_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    recipes = sorted(path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").glob("*/*.yaml"))
    assert len(recipes) == 10
    for recipe in recipes:
        assert f"(recipes/{recipe})" in readme, recipe


def test_every_promise_of_the_readme_is_held_by_tests_of_its_name() -> None:
    table = (ROOT / "README.md").read_text().split("and the tests that hold it:")[1].split("\n\n")[1]
    rows = table.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [f"U{number}" for number in range(1, 24)]
    pages = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for page in pages for name in re.findall(r"^def (test_\w+)", page, flags=re.MULTILINE)}
    for number, row in enumerate(rows, 1):
        names = re.findall(r"`(test_\w+)`", row)
        assert names, row
        assert all(name in defined and f"_u{number:02d}_" in name for name in names), row


def test_the_tree_of_the_readme_names_every_module_and_nothing_else() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"\b\w+\.py\b", tree))
    source = {path.name for path in (ROOT / "src/plainlora").rglob("*.py") if path.parent.name != "commands"}
    programs = {path.name for folder in ("recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert named == (source | programs) - {"__init__.py"}
    for config in (ROOT / "accelerate_configs").glob("*.yaml"):
        assert config.stem in tree


def test_every_link_to_a_file_leads_somewhere() -> None:
    checked = 0
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
            checked += 1
    assert checked >= 6


def test_the_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    two_lines, example = blocks("python", "README.md")
    names = {"model": make_model("llama")}
    exec(example, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    names["trainer"] = make_peft_trainer(tmp_path)
    exec(two_lines, names)
    names["trainer"].train()
    assert names["trainer"].state.log_history[0]["loss"] > 0
