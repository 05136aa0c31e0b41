"""One run in a process of its own. What needs a real run is in test_table.py and test_sweep.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plainlora.errors import UserError
from plainlora.experiments import runs
from tests.conftest import ROOT
from tests.refusals import Run

CONFIG = "recipes/distilbert-imdb/lora.yaml"


def test_settings_come_from_the_flags_then_the_yaml_then_the_recipe() -> None:
    settings = runs.resolve(CONFIG, ["--lora-r", "3", "--method=full"], {})
    assert (settings["lora_r"], settings["method"]) == (3, "full")
    assert (settings["lora_alpha"], settings["lora_query"]) == (128, True)
    assert (settings["seed"], settings["train_head"]) == (42, False)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output_dir", "x"], r"--output_dir cannot stand after the --: give it before the --"),
        (["--lora_r", "4", "--config=x"], r"--config cannot stand after the --"),
        (["--overwrite"], r"--overwrite cannot stand after the --"),
        (["--seed=3"], r"--seed cannot stand after the --: use --seeds"),
        (
            ["--push_to_hub", "true"],
            r"--push_to_hub cannot stand after the --: no run is published here",
        ),
        (["--lora_rr", "4"], r"'--lora_rr' is not a flag of recipes/classify.py"),
        (["loose"], r"'loose' is not a flag"),
        (["--lora_r", "four"], r"--lora_r.*: invalid int value: 'four'"),
        (["--method", "half"], r"invalid choice: 'half'"),
    ],
)
def test_flags_that_cannot_go_to_every_run(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        runs.resolve(CONFIG, flags, {"seed": "use --seeds"})


def test_a_yaml_with_no_such_method(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: half\n")
    with pytest.raises(UserError, match=r"a.yaml: method is last_layers, lora or full, not 'half'"):
        runs.resolve(str(tmp_path / "a.yaml"), [], {})


@pytest.mark.parametrize("verb", [["table"], ["sweep", "--search", "lora_r=4|8"]], ids=["table", "sweep"])
def test_outside_a_checkouts_root_nothing_is_run(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plainlora: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    said = plainlora(*verb, "--config", ROOT / CONFIG)
    assert said == "error: there is no recipes/classify.py here; call this from the root of a checkout"
    assert list(tmp_path.iterdir()) == []


def test_the_program_of_the_checkout_is_started_in_which_the_command_is_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "classify.py").write_text("raise SystemExit('error: another program')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^another program \(log: run.log\)$"):
        runs.run_recipe(str(ROOT / CONFIG), [], Path("run"))


def test_one_command_at_a_time_in_a_folder(tmp_path: Path) -> None:
    holder = (
        "import sys, time; from plainlora.experiments.runs import locked_folder\n"
        "with locked_folder(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another command is at work in"), runs.locked_folder(str(tmp_path)):
            pass
        process.kill()
        process.wait()
        with runs.locked_folder(str(tmp_path)):  # a killed command leaves no lock behind
            pass


def test_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, runs.locked_folder(str(tmp_path)):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; what is finished is kept, and the same command continues\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="not run: root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to"), runs.locked_folder(str(tmp_path / "below")):
        pass


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert runs.duration(seconds) == shown
