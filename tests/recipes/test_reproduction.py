"""A run is made again from what it recorded, and where it comes out differently the first difference is named."""

import json
import shutil
from pathlib import Path

import pytest

from plainlora.errors import UserError
from plainlora.run.reproduction import compare_runs, remaining_flags, reproduce
from tests.conftest import run_program
from tests.recipes.conftest import RunSFT
from tests.refusals import Run


@pytest.fixture
def trained(run_sft: RunSFT, tmp_path: Path, rows_file: Path) -> Path:
    """A finished run on rows of its own; the library's threads are those of the tests."""
    rows = shutil.copy(rows_file, tmp_path / "rows.jsonl")
    return run_sft("llama", "run", "--dataset_name", str(rows), "--merge", "true", "--overwrite")


def test_u17_a_run_is_reproduced_to_the_byte_and_another_is_told_apart(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    verb = ("-c", "from plainlora.commands import main; main()", "reproduce", str(trained))
    done = run_program(*verb, "--output", again)
    assert done.returncode == 0, done.stderr
    assert "can be reproduced: the second run trained the same bytes" in done.stdout
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (trained / name).read_bytes()
    assert not (again / "merged").exists()

    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(reversed(lines)))
    done = run_program(*verb)
    assert done.returncode == 1, done.stderr
    assert "the first thing that differs: training rows" in done.stdout
    assert "equal  trained weights at the start" in done.stdout
    assert "OTHER  trained weights at the end" in done.stdout


def test_the_program_is_the_checkouts_whatever_path_was_recorded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plainlora: Run
) -> None:
    recorded = json.loads((trained / "run.json").read_text())
    evil = tmp_path / "elsewhere" / "sft.py"
    evil.parent.mkdir()
    evil.write_text(f"open({str(tmp_path / 'started')!r}, 'w')")
    (trained / "run.json").write_text(json.dumps(recorded | {"command": [str(evil), *recorded["command"][1:]]}))
    assert all(stage.equal for stage in reproduce(trained, tmp_path / "again"))
    monkeypatch.chdir(tmp_path)
    said = plainlora("reproduce", trained)
    assert said == "error: there is no recipes/sft.py here; call this from the root of a checkout"
    assert not (tmp_path / "started").exists()


PLACES = {
    "base weights": ("base", "weights"),
    "training rows": ("rows", "train", "sha256"),
    "trained weights at the start": ("trained_at_start_sha256",),
    "order of the rows": ("order_sha256",),
    "steps": ("steps",),
    "trained weights at the end": ("weights", "sha256"),
}


def test_what_differs_is_named(trained: Path, tmp_path: Path) -> None:
    assert all(stage.equal for stage in compare_runs(trained, trained))
    other = shutil.copytree(trained, tmp_path / "other")
    recorded = (trained / "run.json").read_text()
    for name, path in PLACES.items():
        run = json.loads(recorded)
        place = run
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = "another"
        (other / "run.json").write_text(json.dumps(run))
        assert [stage.name for stage in compare_runs(trained, other) if not stage.equal] == [name]

    file = trained / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    changed = [stage.name for stage in compare_runs(trained, trained) if not stage.equal]
    assert changed == [f"{file} as its run wrote it"]


def test_a_run_that_cannot_be_made_again_is_refused(trained: Path, tmp_path: Path, plainlora: Run) -> None:
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="the second run ended with exit code 2"):
        reproduce(trained, tmp_path / "again", print)
    run = json.loads((trained / "run.json").read_text())
    del run["weights"], run["order_sha256"]
    (trained / "run.json").write_text(json.dumps(run))
    assert "has no weights; its training did not finish" in plainlora("reproduce", trained)
    assert "has no run.json; give the output_dir of a finished run" in plainlora("reproduce", tmp_path)
    assert "is not a folder" in plainlora("reproduce", tmp_path / "rows")
    assert "is not a folder" in plainlora("reproduce", trained / "run.json")
    assert "already exists" in plainlora("reproduce", trained, "--output", tmp_path)


def test_flags_of_where_and_after_are_left_out() -> None:
    command = ["--config", "a.yaml", "--output_dir=x", "--seed", "3", "--overwrite", "--merge", "true", "--lora_r=4"]
    command += ["--resume_from_checkpoint", "true", "--sample_prompts", "one", "two", "--push-to-hub"]
    assert remaining_flags(command) == ["--seed", "3", "--lora_r=4", "--sample_prompts", "one", "two"]


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        (
            "command",
            ["../evil.py", [], ["rm.py"], "sft.py", [1]],
            "the command in its run.json is not valid; train again",
        ),
        (
            "config",
            ["lora.yaml", [1], {"env": {"PATH": "."}}, {"env": [1]}],
            "the config in its run.json is not valid; train again",
        ),
        ("processes", [0, "2", 10**6], "the processes and threads in its run.json is not valid; train again"),
        ("threads", [None, -1], "the processes and threads in its run.json is not valid; train again"),
        ("device", [None, 0], "the device in its run.json is not valid; train again"),
        ("versions", [None, ["torch"]], "the versions in its run.json is not valid; train again"),
        ("weights", [{}, None], "run.json has no weights.sha256; only finished runs can be compared"),
        ("rows", [None], "run.json has no rows.train.sha256; only finished runs can be compared"),
    ],
)
def test_u23_a_record_that_nothing_here_wrote_starts_nothing(
    name: str, values: list[object], said: str, trained: Path, plainlora: Run
) -> None:
    run = json.loads((trained / "run.json").read_text())
    for value in values:
        (trained / "run.json").write_text(json.dumps(run | {name: value}))
        assert plainlora("reproduce", trained).endswith(said)


def test_leave_to_run_a_models_code_is_not_taken_from_a_file() -> None:
    for flags in (["--trust_remote_code", "true"], ["--trust-remote-code=true"], ["--trust_remote_code"]):
        assert remaining_flags([*flags, "--seed", "1"]) == ["--seed", "1"]
