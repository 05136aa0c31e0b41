"""The command, `make bench`: every suite in small, and options that are refused."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main, with_weights
from benchmarks.interleave import time_interleaved
from benchmarks.language import plan_run, random_base
from benchmarks.suites import SUITES, list_cases
from tests.conftest import ROOT, run_program
from tests.refusals import the_one_line

# A case or two of each suite, by the end of its name and its table.
CASES = (
    "v_proj 896 -> 128, r=2, dropout 0.1",
    "GPT-2 768 x 50,257",
    *("1 x 1024 matched", "1 x 1024 as shipped", "NF4 matched", "4 x 512 matched"),
    *("query and value as shipped", "r=16 on every linear layer matched"),
    "q_proj and v_proj of",
    "answers 0.1",
)


def bench(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    return run_program("-m", "benchmarks", *flags)


def test_every_suite_runs_and_leaves_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    flags = ("--device", "cpu", "--size", "tiny", "--repeats", "2", "--profile")
    done = bench(*flags, "--json", path, "--case", *CASES)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = json.loads(path.read_text())["cases"]
    assert {case["suite"] for case in cases} == set(SUITES)
    assert len(cases) == 1 + 1 + 2 + 2 + 1 + 1 + 2 + 4 + 1
    for case in cases:
        assert case["seconds"].keys() == case["facts"].keys() == case["variants"].keys() >= {"fused", "peft"}
        for variant, seconds in case["seconds"].items():
            assert len(seconds) == 2
            assert min(seconds) > 0
            facts = case["facts"][variant]
            if "FLOP/s" in facts:  # counted, not run
                continue
            assert 0 <= facts["peak above weights"] < facts["peak"]
            assert sum(facts["profile"].values()) > 0
        if case["suite"] in ("gpt2", "qwen2", "smollm2", "llama2", "scaling"):
            assert case["facts"]["fused"]["profile"]["matrix products"] > 0
        if (
            case["suite"] in ("gpt2", "qwen2", "smollm2", "llama2", "classify", "scaling")
            and case["table"] == "matched"
        ):
            assert max(case["loss differences"].values()) < 1e-4
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
        (("--model-folder", "nowhere"), "--model-folder nowhere: there is no config.json in it"),
        (
            ("--case", "gpt9"),
            "--case gpt9: no case of layer, head, gpt2, qwen2, smollm2, llama2, classify, lifecycle, scaling has that",
        ),
        (("--json", "figures.txt"), "--json figures.txt: give a file whose name ends in .json"),
        (("--suite", "gpt9"), "invalid choice: 'gpt9'"),
    ],
)
def test_bad_flags_are_refused_in_one_line_and_leave_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        main(flags)
    assert message in the_one_line(raised.value.code, *capfd.readouterr())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_gives_smollm2_its_weights(tmp_path: Path) -> None:
    case = next(case for _, case in list_cases("smollm2", "tiny", "cpu"))
    shape = case.options | {"backend": "peft", "training": {}}
    random_base(plan_run(shape, "cpu", str(tmp_path))).save_pretrained(tmp_path / "base")
    given = with_weights(case, str(tmp_path / "base"))
    assert given.name == f"{case.name}, real weights"
    losses = [time_interleaved("language", each, "cpu", 1).facts["peft"]["losses"] for each in (case, given)]
    assert losses[0] == losses[1]
    other = next(case for _, case in list_cases("gpt2", "tiny", "cpu"))
    assert with_weights(other, "anywhere") is other


def test_make_hands_the_options_on() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "bench", "ARGS=--suite layer --size tiny"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    # Run by `make test-all`, this make is an inner one, which also prints the folders it enters and leaves.
    assert any(line.endswith("/python -m benchmarks --suite layer --size tiny") for line in done.stdout.splitlines())
