"""`plainlora sweep`: the search, the study that goes on, and the real program on a tiny DistilBERT."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from transformers import AutoConfig

from plainlora.commands import main
from plainlora.errors import UserError
from plainlora.experiments.runs import resolve
from plainlora.experiments.search import default_search, no_projection, own_values, parse_search, parse_spec, to_flags
from plainlora.experiments.sweep import Plan, best_command, finished, open_study
from plainlora.settings.programs import CLASSIFY, SFT
from tests.conftest import ROOT
from tests.experiments.test_table import fail, write_recipe

CONFIG = "recipes/distilbert-imdb/lora.yaml"


@pytest.mark.parametrize(
    ("spec", "distribution"),
    [
        ("1e-5..1e-3", FloatDistribution(1e-5, 1e-3, log=True)),
        ("0.1..1.0", FloatDistribution(0.1, 1.0, log=True)),
        ("0.2..1.0", FloatDistribution(0.2, 1.0)),
        ("0..0.1", FloatDistribution(0, 0.1)),
        ("1..5.0", FloatDistribution(1, 5)),
        ("-1.5..1.5", FloatDistribution(-1.5, 1.5)),
        ("2..5", IntDistribution(2, 5)),
        ("1..100", IntDistribution(1, 100)),
        ("4|8|16", CategoricalDistribution(["4", "8", "16"])),
        ("true|false", CategoricalDistribution(["true", "false"])),
    ],
)
def test_specs(spec: str, distribution: optuna.distributions.BaseDistribution) -> None:
    assert parse_spec("name", spec) == distribution


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("learning_rate", r"write NAME=SPEC"),
        ("learning_rate=1e-5", r"is not a choice of different values; write a range such as"),
        ("learning_rate=1e-3..1e-5", r"the first end must be below the second"),
        ("learning_rate=1e-5..", r"the ends of a range are numbers"),
        ("learning_rate=0..inf", r"the first end must be below the second"),
        ("learning_rate=nan..1", r"the first end must be below the second"),
        ("lora_r=4|4", r"not a choice of different values"),
        ("lora_r=4||8", r"not a choice of different values"),
        ("lora_r=4|eight", r"--lora_r.*: invalid int value: 'eight'"),
        ("lora_r=0.1..8.5", r"--lora_r.*: invalid int value: '0.1'"),
        ("learning_rte=1..2", r"learning_rte is not an option; did you mean learning_rate\?"),
        ("seed+learning_rte=1..2", r"learning_rte is not an option"),
        ("output_dir=a|b", r"output_dir is the same in every trial"),
        ("method=lora|full", r"method is the same in every trial"),
        ("lora_alpha=8|16", r"lora_alpha is the same in every trial"),
    ],
)
def test_bad_searches(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_search(CLASSIFY, [word], {"lora_alpha"})


def test_a_name_stands_once_whatever_it_is_joined_to() -> None:
    with pytest.raises(UserError, match="lora_r is given twice"):
        parse_search(CLASSIFY, ["lora_r=2|4", "lora_alpha+lora_r=2|4"], set())
    assert parse_search(CLASSIFY, ["lora_alpha+lora_r=2|4"], set()) == {"lora_alpha+lora_r": "2|4"}
    assert to_flags(CLASSIFY, {"lora_alpha+lora_r": "4", "learning_rate": 0.5}) == [
        "--lora_alpha=4", "--lora_r=4", "--learning_rate=0.5",
    ]  # fmt: skip


def defaults(backbone: Path, *flags: str) -> dict[str, str]:
    given = [*flags, f"--model_name_or_path={backbone}"]
    return default_search(CLASSIFY, resolve(CONFIG, given, {}), {flag[2:].partition("=")[0] for flag in flags})


def test_what_is_searched_by_default(backbone_dirs: dict[str, Path]) -> None:
    distilbert = backbone_dirs["distilbert"]
    numbers = ["learning_rate", "lora_r", "lora_alpha"]
    kinds = [f"lora_{kind}" for kind in ("query", "key", "value", "projection", "mlp", "head")]
    assert list(defaults(distilbert)) == numbers + kinds
    assert list(defaults(distilbert, "--lora_mlp=true", "--lora_r=4")) == [
        name for name in numbers + kinds if name not in ("lora_mlp", "lora_r")
    ]
    assert list(defaults(distilbert, "--train_head=true")) == numbers + kinds[:-1]
    assert list(defaults(distilbert, "--lora_target_modules=q_lin")) == numbers
    for method in ("last_layers", "full"):
        assert list(defaults(distilbert, f"--method={method}")) == ["learning_rate", "weight_decay"]
    # GPT-2 has one weight for three kinds, which the recipe wants on or off together.
    assert list(defaults(backbone_dirs["gpt2"])) == [*numbers, "lora_query+lora_key+lora_value", *kinds[3:]]


def test_every_default_is_a_spec_that_the_recipe_understands(backbone_dirs: dict[str, Path]) -> None:
    for method in ("lora", "last_layers", "full"):
        search = defaults(backbone_dirs["gpt2"], f"--method={method}")
        assert parse_search(CLASSIFY, [f"{name}={spec}" for name, spec in search.items()], set()) == search


def test_the_first_trial_is_the_config_itself_as_far_as_the_space_allows() -> None:
    search = {
        "learning_rate": "1e-5..1e-3", "lora_r": "2|8", "lora_alpha": "1|2", "lora_query": "true|false",
        "lora_key": "true|false", "num_train_epochs": "4..9", "weight_decay": "0..0.1",
    }  # fmt: skip
    space = {name: parse_spec(name, spec) for name, spec in search.items()}
    assert own_values(CLASSIFY, space, resolve(CONFIG, [], {})) == {
        "learning_rate": 5e-4, "lora_r": "8", "lora_query": "true", "lora_key": "false", "weight_decay": 0.0,
    }  # fmt: skip


def test_no_kind_at_all() -> None:
    settings = resolve(CONFIG, [], {})  # query and value are on
    off = {f"lora_{kind}": "false" for kind in ("query", "key", "value", "projection", "mlp", "head")}
    assert no_projection(off, settings)
    assert not no_projection(off | {"lora_mlp": "true"}, settings)
    assert no_projection({"lora_query+lora_value": "false"}, settings)
    assert not no_projection({"lora_query": "false"}, settings)
    assert not no_projection({"lora_r": "4"}, settings | dict.fromkeys(off, False))


def plan(**changes: object) -> Plan:
    search = {"learning_rate": "1e-5..1e-3", "lora_r": "2|4|8"}
    given = {"program": CLASSIFY, "config": CONFIG,
             "settings": resolve(CONFIG, [], {}), "search": search, "metric": "validation_accuracy",
             "flags": ["--seed", "1"]} | changes  # fmt: skip
    return Plan(**given)  # type: ignore[arg-type]


def go_on(output: Path, trials: int, die_at: int | None = None, seed: int = 0) -> list[dict[str, object]]:
    """The sweep's loop without its runs; the parameters of the finished trials."""
    study = open_study(plan(), output, seed)
    while len(finished(study)) < trials:
        trial = study.ask(plan().space)
        if trial.number == die_at:
            break
        study.tell(trial, trial.params["learning_rate"])
    return [trial.params for trial in finished(study)]


def test_a_study_that_goes_on_repeats_none_of_its_trials(tmp_path: Path) -> None:
    """Those that came by chance at its beginning least of all."""
    for trials in (3, 5, 9):
        go_on(tmp_path, trials)
    assert len({json.dumps(parameters) for parameters in go_on(tmp_path, 14)}) == 14


def test_the_same_seed_tries_the_same_and_another_does_not(tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        found.append(go_on(tmp_path / name, 14, seed=seed))
    assert found[0] == found[1] != found[2]


def test_a_trial_that_was_running_has_failed_and_is_tried_again(tmp_path: Path) -> None:
    go_on(tmp_path, 5, die_at=2)
    (tmp_path / "trial-002" / "checkpoint-1").mkdir(parents=True)
    again = open_study(plan(), tmp_path, 0)
    assert [trial.state for trial in again.trials] == [
        TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING,
    ]  # fmt: skip
    trial = again.ask(plan().space)
    assert trial.number == 3
    assert trial.params == again.trials[2].params
    assert not (tmp_path / "trial-002").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "validation_f1"}, "metric was validation_accuracy, is validation_f1"),
        ({"flags": []}, "flags was --seed 1, is none"),
        (
            {"search": {"learning_rate": "1e-5..1e-3", "lora_r": "2|4"}},
            r"search: lora_r was 2\|4\|8, is 2\|4",
        ),
        (
            {"config": "recipes/distilbert-imdb/lora_best.yaml"},
            "config: learning_rate was 0.0005, is 0.002; ",
        ),
    ],
)
def test_a_study_that_was_begun_otherwise_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    go_on(tmp_path, 1)
    with pytest.raises(UserError, match=rf"with other settings \(.*{said}.*\); give another --output_dir"):
        open_study(plan(**changes), tmp_path, 0)
    assert len(finished(open_study(plan(), tmp_path, 0))) == 1


def test_a_study_without_any_result_may_begin_otherwise(tmp_path: Path) -> None:
    study = open_study(plan(), tmp_path, 0)
    study.tell(study.ask(plan().space), state=TrialState.FAIL)
    again = open_study(plan(metric="validation_loss"), tmp_path, 0)
    assert [trial.state for trial in again.trials] == [TrialState.WAITING]
    assert again.direction == optuna.study.StudyDirection.MINIMIZE


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("not a database, but long enough to be looked into" * 100)
    with pytest.raises(UserError, match=r"study.db cannot be read \(.*\); give another --output_dir"):
        open_study(plan(), tmp_path, 0)


def test_the_best_command_line_can_be_pasted() -> None:
    line = best_command(plan(config="my recipes/a.yaml"), {"learning_rate": 1e-05, "lora_query+lora_key": "true"})
    assert line == (
        "accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/classify.py --config "
        "'my recipes/a.yaml' --seed 1 --learning_rate=1e-05 --lora_query=true --lora_key=true"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", "0"], r"--trials must be at least 1, not 0"),
        (["--output_dir", ""], r"--output_dir is empty; give a folder"),
        (["--seed", "-1"], r"--seed must be at least 0, not -1"),
        (
            ["--metric", "test_accuracy"],
            r"a sweep of recipes/classify.py can optimise validation_accuracy, ",
        ),
        (["--search", "lora_r=4"], r"--search lora_r=4 is not a choice"),
        (["--search", "lora_r=4|8", "--search", "lora_r=2|4"], r"lora_r is given twice"),
        (["--search", "lora_r=4|8", "--", "--lora_r", "2"], r"lora_r is the same in every trial"),
        (["--", "--output_dir", "x"], r"--output_dir cannot stand after the --"),
    ],
)
def test_bad_arguments_run_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "lora.yaml").write_text("lora_query: true\n")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    printed, line = fail(capfd, "sweep", "--config", "lora.yaml", *arguments)
    assert re.search(said, line)
    assert printed == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.yaml", "recipes"]


def processes_of(folder: Path) -> list[int]:
    """The processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_killed_sweep_goes_on(
    backbone_dirs: dict[str, Path], texts_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "tiny" / "lora.yaml", backbone_dirs["distilbert"], texts_file)
    output = tmp_path / "out"
    command = [
        "sweep", "--config", str(recipe), "--trials", "2", "--output_dir", str(output),
        "--search", "learning_rate=1e-5..1e-3", "lora_r=2|4",
    ]  # fmt: skip
    program = [sys.executable, "-c", "from plainlora.commands import main; main()", *command]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_until((output / "trial-001.log").exists)
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(output), 10)  # its run ends with it

    first = (output / "trial-000" / "command.json").stat().st_mtime_ns
    main(command)
    printed = capfd.readouterr().out
    assert "1 trials are finished already" in printed
    assert re.search(r"^2/2  validation_accuracy 0\.\d{4}  best 0\.\d{4}  learning_rate ", printed, re.MULTILINE)
    assert (output / "trial-000" / "command.json").stat().st_mtime_ns == first

    found = json.loads((output / "sweep.json").read_text())
    states = {trial["trial"]: trial["state"] for trial in found["trials"]}
    assert states == {0: "finished", 1: "interrupted", 2: "finished"}
    by_number = {trial["trial"]: trial for trial in found["trials"]}
    assert by_number[0]["parameters"] == {"learning_rate": 5e-4, "lora_r": "4"}  # the config's own
    assert by_number[2]["parameters"] == by_number[1]["parameters"] != by_number[0]["parameters"]
    assert by_number[2]["output_dir"] == "trial-002"
    assert not (output / "trial-001").exists()
    for trial in (by_number[0], by_number[2]):
        folder = output / trial["output_dir"]
        assert trial["value"] == json.loads((folder / "all_results.json").read_text())["validation_accuracy"]
        arguments = json.loads((folder / "run.json").read_text())["arguments"]
        assert arguments["learning_rate"] == trial["parameters"]["learning_rate"]
        assert str(arguments["lora_r"]) == trial["parameters"]["lora_r"]
    assert found["best_command"] in printed
    assert f"--learning_rate={found['trials'][0]['parameters']['learning_rate']}" in found["best_command"]
    assert found["versions"]["optuna"] == optuna.__version__
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^\| \d+ \| 0\.", (output / "sweep.md").read_text(), re.MULTILINE)) == 2

    # There are enough: nothing runs. With other flags: refused, and what is there stays.
    main(command)
    assert "2 trials are finished already" in capfd.readouterr().out
    _, line = fail(capfd, *command, "--", "--weight_decay", "0.1")
    assert "with other settings (flags was none, is --weight_decay 0.1)" in line


def test_without_validation_rows_the_first_run_says_so(
    backbone_dirs: dict[str, Path], texts_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        tmp_path / "tiny" / "lora.yaml", backbone_dirs["distilbert"], texts_file, validation_split_size=None
    )
    _, line = fail(capfd, "sweep", "--config", recipe, "--trials", 2, "--output_dir", tmp_path / "out")
    assert "the first run failed: " in line
    assert "has no validation_accuracy; give the recipe validation rows with -- --validation_split_size 0.1" in line
    assert not (tmp_path / "out" / "sweep.json").exists()


def language_defaults(base: Path, *flags: str) -> dict[str, str]:
    given = [*flags, f"--model_name_or_path={base}"]
    fixed = {flag[2:].partition("=")[0] for flag in flags}
    return default_search(SFT, resolve("recipes/quickstart/lora.yaml", given, {}), fixed)


def test_of_a_language_model_the_rate_the_rank_and_the_targets_are_searched(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    found = language_defaults(model_dirs["llama"])
    assert list(found) == ["learning_rate", "lora_r", "lora_target_modules"]
    assert parse_spec("learning_rate", found["learning_rate"]) == FloatDistribution(1e-5, 5e-3, log=True)
    assert found["lora_target_modules"] == "all-linear|q_proj,v_proj"
    assert language_defaults(model_dirs["gpt2"])["lora_target_modules"] == "all-linear|c_attn"
    for method in ("last_layers", "full"):
        assert list(language_defaults(model_dirs["llama"], f"--method={method}")) == ["learning_rate"]
    AutoConfig.for_model("gpt_neox").save_pretrained(tmp_path)
    assert language_defaults(tmp_path)["lora_target_modules"] == "all-linear|query_key_value"
    assert list(language_defaults(model_dirs["llama"], "--lora_r=4")) == ["learning_rate", "lora_target_modules"]
    assert parse_search(SFT, [f"{name}={spec}" for name, spec in found.items()], set()) == found
    space = {name: parse_spec(name, spec) for name, spec in found.items()}
    assert own_values(SFT, space, resolve("recipes/quickstart/lora.yaml", [], {})) == {
        "learning_rate": 2e-3, "lora_r": "16", "lora_target_modules": "all-linear",
    }  # fmt: skip
    assert to_flags(SFT, {"lora_target_modules": "q_proj,v_proj", "optim_args": "a=1,b=2"}) == [
        "--lora_target_modules", "q_proj", "v_proj", "--optim_args=a=1,b=2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--lora_layers_to_transform=0", ["learning_rate", "lora_r"]),  # all-linear would be refused
        ('--lora_rank_pattern={"gate_proj": 2}', ["learning_rate", "lora_r"]),  # a name that other targets lack
        ("--adapter_name_or_path=outputs/quickstart", ["learning_rate"]),  # keeps its own rank and targets
    ],
)
def test_what_other_settings_fix_is_not_searched(flag: str, names: list[str], model_dirs: dict[str, Path]) -> None:
    assert list(language_defaults(model_dirs["llama"], flag)) == names


def test_a_sweep_of_a_language_model_goes_by_test_loss(
    model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [f"--model_name_or_path={model_dirs['llama']}", f"--dataset_name={rows_file}", "--test_split_size=8"]
    given += [
        "--max_steps=2",
        "--use_cpu=true",
        "--eval_strategy=no",
        "--exact_match_rows=2",
        "--max_new_tokens=2",
        "--max_length=256",
    ]
    command = ["sweep", "--config", "recipes/quickstart/lora.yaml", "--output_dir", str(tmp_path / "out")]
    search = ["--search", "learning_rate=1e-3..1e-2", "lora_target_modules=all-linear|q_proj,v_proj"]
    main([*command, "--trials", "2", *search, "--", *given])
    printed = capfd.readouterr().out
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    values = [trial["value"] for trial in found["trials"]]
    assert values == sorted(values)
    for trial in found["trials"]:
        folder = tmp_path / "out" / trial["output_dir"]
        assert trial["value"] == json.loads((folder / "all_results.json").read_text())["eval_loss_adapter"]
        targets = json.loads((folder / "run.json").read_text())["arguments"]["lora_target_modules"]
        asked = trial["parameters"]["lora_target_modules"]
        assert targets in (asked, asked.split(","))
    assert found["best_command"].startswith(
        "accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/sft.py"
    )
    assert f"eval_loss {values[0]:.4f}, exact_match 0.0000" in printed
    assert "The test rows chose these settings" in printed
    _, line = fail(capfd, *command, "--metric", "validation_accuracy")
    assert "a sweep of recipes/sft.py can optimise eval_loss, eval_perplexity, exact_match" in line


def test_no_secret_is_kept_with_a_study_or_told_by_its_command(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{(ROOT / CONFIG).read_text()}\nhub_token: hf_one\nenv:\n  WANDB_API_KEY: two\n")
    secret = plan(config=str(recipe), flags=["--hub_token", "hf_three", "--seed", "1"])
    assert secret.record()["flags"] == ["--hub_token", "...", "--seed", "1"]
    open_study(secret, tmp_path, 0)
    kept = (tmp_path / "study.db").read_bytes() + best_command(secret, {}).encode()
    assert b"WANDB_API_KEY" in kept
    assert not [word for word in (b"hf_one", b"two", b"hf_three") if word in kept]


def test_the_recipes_own_values_are_tried_again_if_no_trial_has_a_result(tmp_path: Path) -> None:
    study = open_study(plan(), tmp_path, 0)
    first = study.ask(plan().space)
    study.tell(first, state=TrialState.FAIL)
    again = open_study(plan(), tmp_path, 0).ask(plan().space)
    assert again.params == first.params
