"""The race itself: every suite in small, real processes, and arms that fail."""

import json
import multiprocessing
import subprocess
from pathlib import Path

import pytest
import torch

from plainlora.bench.case import Case
from plainlora.bench.race import race
from plainlora.bench.suites import SUITES
from plainlora.commands.bench import SUITES as NAMES
from plainlora.errors import UserError
from tests.conftest import run_program
from tests.refusals import Run

# One case of each suite's kinds; both tables of those that have two.
CASES = (
    "v_proj 896 -> 128, r=2, dropout 0.1",
    "GPT-2 768 x 50,257, 512 tokens",
    "matched",
    "as shipped",
    "q_proj and v_proj of",
)


def bench(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    return run_program("-c", "from plainlora.commands import main; main()", "bench", *flags)


def test_the_command_knows_every_suite() -> None:
    assert list(NAMES) == list(SUITES)


def test_every_suite_runs_and_leaves_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = bench(
        *(
            "--device",
            "cpu",
            "--size",
            "tiny",
            "--repeats",
            "2",
            "--profile",
            "--json",
            path,
            "--case",
            *CASES,
        )
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cases = json.loads(path.read_text())["cases"]
    assert {case["suite"] for case in cases} == set(SUITES)
    assert len(cases) == 1 + 1 + 2 + 2 + 1 + 4 + 4
    for case in cases:
        assert case["seconds"].keys() == case["facts"].keys() == case["arms"].keys() >= {"fused", "peft"}
        for arm, seconds in case["seconds"].items():
            assert len(seconds) == 2
            assert min(seconds) > 0
            facts = case["facts"][arm]
            assert 0 <= facts["peak above weights"] < facts["peak"]
            assert sum(facts["profile"].values()) > 0
        if case["suite"] in ("gpt2", "qwen2", "llama2"):
            assert case["facts"]["fused"]["profile"]["matrix products"] > 0
    written = {each.name for each in tmp_path.iterdir()}
    assert written == {"bench.json", "bench.md", *(f"{suite}.png" for suite in SUITES)}
    assert all(case["name"].startswith("tiny, ") and not case["targets"] for case in cases)
    assert done.stdout.count("tiny, in place of ") == len(cases)
    assert "tiny: no target is judged; 0 cases not run" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: here is a GPU")
def test_without_a_gpu_llama2_says_that_it_is_not_run(tmp_path: Path) -> None:
    done = bench("--suite", "llama2", "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not run: no GPU" in done.stdout
    assert "0 of 0 targets met; 1 cases not run" in done.stdout
    assert json.loads((tmp_path / "bench.json").read_text())["cases"][0]["not_run"] == "no GPU"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--repeats", "0"), "--repeats must be at least 1, not 0"),
        (("--case", "gpt9"), "--case gpt9: no case of layer, head, gpt2, qwen2, llama2, classify, lifecycle has that"),
        (("--json", "figures.txt"), "--json figures.txt: give a file whose name ends in .json"),
        (("--suite", "gpt9"), "invalid choice: 'gpt9'"),
    ],
)
def test_bad_flags_are_refused_in_one_line(plainlora: Run, flags: tuple[str, ...], message: str) -> None:
    assert message in plainlora("bench", *flags)


def test_an_arm_that_fails_is_named_and_the_others_end() -> None:
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": False, "p": 0.0, "tokens": 4, "passes": 1}
    case = Case("layer", "broken", {"floor": {}, "fused": {"p": 2.0}}, shape)
    with pytest.raises(
        UserError, match=r"^bench: layer, broken, fused stopped \(LoRAError: lora_dropout must lie in"
    ) as told:
        race("layer", case, "cpu", 1)
    assert "in take_part" in told.value.__notes__[0]


def test_an_arm_that_stops_before_its_turn_says_why() -> None:
    case = Case("layer", "broken", {"floor": {}, "fused": {}})

    def wait_for_the_end(said: str) -> None:
        for child in multiprocessing.active_children() if "loads" in said else ():
            child.join(60)

    with pytest.raises(UserError, match=r"^bench: layer, broken, floor stopped \(ModuleNotFoundError: No module"):
        race("no_such_module", case, "cpu", 1, progress=wait_for_the_end)


def test_an_arm_loads_when_the_one_before_is_ready() -> None:
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": False, "p": 0.0, "tokens": 4, "passes": 1}
    case = Case("layer", "broken", {"floor": {}, "fused": {"p": 2.0}, "peft": {}}, shape)
    said: list[str] = []
    with pytest.raises(UserError, match="fused stopped"):
        race("layer", case, "cpu", 1, progress=said.append)
    assert [line.rpartition(", ")[2] for line in said if "loads" in line] == ["floor", "fused"]


def test_a_race_keeps_to_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that would end later are left out, and an arm that hangs is given up."""
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": False, "p": 0.0, "tokens": 4, "passes": 1}
    case = Case("layer", "small", {"floor": {}, "fused": {}}, shape)
    outcome = race("layer", case, "cpu", 50, seconds=0)
    assert {arm: len(seconds) for arm, seconds in outcome.seconds.items()} == {"floor": 1, "fused": 1}
    monkeypatch.setattr("plainlora.bench.race.GRACE", 0.0)
    with pytest.raises(UserError, match=r"^bench: layer, small, floor did not answer in time$"):
        race("layer", case, "cpu", 1, seconds=0)


def test_every_arm_has_its_turn_in_every_round() -> None:
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": True, "p": 0.1, "tokens": 4, "passes": 1}
    case = Case("layer", "small", {"floor": {}, "fused": {}, "peft": {}}, shape)
    said: list[str] = []
    outcome = race("layer", case, "cpu", 2, progress=said.append)
    order = [line.rpartition(", ")[2] for line in said if "round" in line]
    assert order == ["floor", "fused", "peft"] * 3
    assert {arm: len(seconds) for arm, seconds in outcome.seconds.items()} == {"floor": 2, "fused": 2, "peft": 2}


def test_an_arm_that_is_killed_is_named() -> None:
    """As the system does where memory runs out."""
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": True, "p": 0.1, "tokens": 4, "passes": 1}
    case = Case("layer", "small", {"floor": {}, "fused": {}}, shape)

    def kill(said: str) -> None:
        if said.endswith("round 1 of 2, fused"):
            (_, fused) = sorted(
                multiprocessing.active_children(), key=lambda child: int(child.name.rpartition("-")[2])
            )
            fused.kill()
            fused.join()

    with pytest.raises(
        UserError, match=r"^bench: layer, small, fused was killed; most likely there is too little memory"
    ):
        race("layer", case, "cpu", 2, progress=kill)
