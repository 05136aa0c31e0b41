"""Every command, block of Python and link of every page is checked or run, and none is missed."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from trl import ModelConfig, ScriptArguments

import benchmarks.__main__
import plainlora
from plainlora.commands import build_parser
from plainlora.errors import UserError
from plainlora.settings.arguments import ClassifyArguments, ClassifyConfig, SFTArguments, SFTRecipeConfig
from plainlora.settings.parsing import StrictParser
from tests.conftest import ROOT, make_model, make_peft_trainer
from tests.test_imports import HOUSE

PAGES = (
    *("README.md", "CONTRIBUTING.md", "recipes/quickstart/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)
SITE = ROOT / "docs" / "site"
PLAIN = {
    *("source .venv/bin/activate", ".venv/bin/pre-commit install", "python recipes/quickstart/build.py"),
    *("pip install .", "pip install .[train]", "pip install .[playground]"),
}


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
    if words[:2] == ["accelerate", "launch"] or (
        words[0] == "python" and words[1] in ("recipes/sft.py", "recipes/classify.py")
    ):
        program = next(number for number, word in enumerate(words) if word.endswith(".py"))
        for word in words:
            if word.endswith((".yaml", ".py")):
                assert (ROOT / word).is_file(), command
        parse_recipe_flags(words[program + 1 :], Path(words[program]).name)
        return "launch"
    if words[:2] == ["python", "-m"]:  # what measured a page
        importlib.import_module(words[2]).build_parser().parse_args(words[3:])
        return "module"
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
    counted = {"make": 24, "launch": 31, "plainlora": 46, "flag": 26, "module": 2, "plain": 8}
    assert found == counted, "a page changed: count again"


def test_a_wrong_command_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for wrong in (
        "make coffee",
        "make bench ARGS='--suite layers'",
        "make test ARGS=-x",
        "plainlora merge --adaptor x --output y",
        "accelerate launch recipes/sft.py --config recipes/none.yaml",
        "--lora_rank 4",
        "python -m docs.what-matters.measure quickstart --epochs 2",
        "rm -rf outputs",
    ):
        with pytest.raises((Exception, SystemExit)):  # an assertion or a refusal, whatever the kind
            check(wrong)


def test_every_recipe_has_a_row_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    recipes = sorted(path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").glob("*/*.yaml"))
    assert len(recipes) == 10
    for recipe in recipes:
        assert f"(recipes/{recipe})" in readme, recipe


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 190


def test_every_promise_is_held_by_tests_of_its_name() -> None:
    table = (ROOT / "docs" / "trust.md").read_text().split("The tests that hold it:")[1].split("\n\n")[1]
    rows = table.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [f"U{number}" for number in range(1, 24)]
    pages = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for page in pages for name in re.findall(r"^def (test_\w+)", page, flags=re.MULTILINE)}
    for number, row in enumerate(rows, 1):
        names = re.findall(r"`(test_\w+)`", row)
        assert names, row
        assert all(name in defined and f"_u{number:02d}_" in name for name in names), row


def test_the_tree_names_every_module_and_nothing_else() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().split("Every file, a clause each:")[1].split("```")[1]
    named = set(re.findall(r"\b\w+\.py\b", tree))
    source = {path.name for path in (ROOT / "src/plainlora").rglob("*.py") if path.parent.name != "commands"}
    programs = {path.name for folder in ("recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert named == (source | programs) - {"__init__.py"}
    for config in (ROOT / "accelerate_configs").glob("*.yaml"):
        assert config.stem in tree


def test_the_import_rule_is_told_as_it_is_held() -> None:
    told = (ROOT / "docs" / "architecture.md").read_text().split("recipes, benchmarks, commands\n")[1].split("```")[0]
    lines = [re.split(r"\s{3,}", line.strip().removeprefix("-> "))[0] for line in told.strip().splitlines()]
    assert [set(line.split(", ")) for line in lines[:-2]] == HOUSE[1:-2]


def test_the_page_of_all_settings_is_what_the_dataclasses_say() -> None:
    # In a process of its own: parsers write into the dataclasses that they are made of.
    script = "import configuration; print(configuration.page(), end='')"
    done = subprocess.run([sys.executable, "-c", script], cwd=SITE, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "configuration.md").read_text() == done.stdout, "run python docs/site/configuration.py"


def test_every_link_to_a_file_leads_somewhere() -> None:
    checked = 0
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
            checked += 1
    assert checked >= 6


def test_every_block_of_python_is_run_or_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/extend.md and docs/from-scratch.md by their own tests."""
    blocks_of = {page: blocks("python", page) for page in PAGES}
    counts = {page: len(found) for page, found in blocks_of.items() if found}
    assert counts == {
        "README.md": 3,
        "docs/extend.md": 2,
        "docs/from-scratch.md": 11,
        "docs/library.md": 1,
        "docs/speed.md": 1,
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    example, fuse, forward = blocks_of["README.md"]
    for each in (example, *blocks_of["docs/library.md"]):
        names = {"model": make_model("llama")}
        exec(each, names)
        assert type(names["model"]).__name__ == "LlamaForCausalLM"
    for number, each in enumerate((fuse, *blocks_of["docs/speed.md"])):
        names = {"trainer": make_peft_trainer(tmp_path / str(number))}
        exec(each, names)
        names["trainer"].train()
        assert names["trainer"].state.log_history[0]["loss"] > 0
    assert statements(forward) == [each for each in statements(LAYER) if each[0] in ("forward", "delta")]


LAYER = (ROOT / "src" / "plainlora" / "lora" / "layer.py").read_text()


def statements(source: str) -> list[tuple[str, str]]:
    """Every function of a source with its body, docstrings, annotations and comments left out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = [
                each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ]
            found.append((node.name, "\n".join(map(ast.unparse, body))))
    return found


def test_every_exported_name_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    listed = {name for members in re.findall(r"members: \[(.*)\]", page) for name in members.split(", ")}
    assert set(plainlora.__all__) <= listed
