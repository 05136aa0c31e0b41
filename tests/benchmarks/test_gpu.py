"""The command for a GPU, at its tiny size on a CPU: what it runs, and what it leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.case import Case
from tests.conftest import ROOT

VARIANTS = {"fused", "peft"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """What the JSON file held from one writing to the next, and the Markdown at the end."""
    path = tmp_path_factory.mktemp("gpu") / "new" / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--size", "tiny", "--json", str(path)]
    run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL)
    states: list[dict[str, Any]] = []
    while run.poll() is None:
        time.sleep(0.2)
        if path.is_file() and (found := json.loads(path.read_text())) not in states[-1:]:
            states.append(found)
    assert run.returncode == 0
    states.append(json.loads(path.read_text()))
    return states, path.with_suffix(".md").read_text()


def test_every_case_is_measured_on_both_sides(written: tuple[list[dict[str, Any]], str]) -> None:
    found = written[0][-1]
    assert [case["name"] for case in found["cases"]] == [case.name for case in gpu.cases("tiny")]
    for case in found["cases"]:
        assert case["figures"].keys() == case["facts"].keys() == case["seconds"].keys() == VARIANTS
        for variant in VARIANTS:
            facts, figures = case["facts"][variant], case["figures"][variant]
            assert len(case["seconds"][variant]) == gpu.STEPS["tiny"]
            assert len(facts["losses"]) == len(facts["tokens"]) == gpu.STEPS["tiny"] + 1
            assert facts["trained in"] == ["float32"]
            assert figures["tokens a second"] > 0
            assert facts["peak"] > 0
            assert figures["predicted"] > 0
        assert case["figures"]["peft"]["time / peft"] == {"median": 1, "min": 1, "max": 1}
        assert 0 <= case["first difference"] <= case["largest difference"] < 1e-4
    assert {"torch", "trl", "peft", "bitsandbytes"} <= found["versions"].keys()


def test_tests_that_need_a_gpu_are_not_run_here(written: tuple[list[dict[str, Any]], str]) -> None:
    tests = written[0][-1]["tests"]
    assert tests["passed"] == tests["failed"] == []
    assert any(name.startswith("tests/test_gpu.py::test_nf4") for name in tests["not run"])
    assert tests["ended"] == "with exit code 0"


def test_what_is_measured_is_written_at_once(written: tuple[list[dict[str, Any]], str]) -> None:
    """A run that is cut off leaves it."""
    assert {len(state["cases"]) for state in written[0]} == {0, 1, 2, 3, 4}
    assert all("tests" in state for state in written[0])


def test_the_table_has_a_row_for_every_variant(written: tuple[list[dict[str, Any]], str]) -> None:
    states, table = written
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == list(gpu.COLUMNS)
    cases = states[-1]["cases"]
    expected = [[case["name"], variant, "float32"] for case in cases for variant in case["facts"]]
    assert [row[:3] for row in rows[1:]] == expected
    assert all(row[0].startswith("tiny, in place of ") for row in rows[1:])
    assert table.startswith("Card: None; CUDA ")
    assert "Tests marked `gpu`: 0 passed, 0 failed, " in table
    assert all(f"- {case['name']}: {case['first difference']:.1e}, " in table for case in cases)


def test_a_case_that_fails_is_told_with_its_place_and_the_others_go_on() -> None:
    case = gpu.cases("tiny")[0]
    broken = Case("gpu", "broken", case.variants, case.options | {"p": 2.0})
    found = gpu.measure(broken, "cpu", "tiny")
    assert found["failed"].startswith("UserError: bench: gpu, broken, fused stopped (LoRAError: lora_dropout must lie")
    assert "in run_variant" in found["where"]
    tests = {"passed": [], "failed": ["tests/test_gpu.py::test_one"], "not run": [], "ended": "with exit code 1"}
    table = gpu.markdown({"card": None, "cuda": None, "described": "", "tests": tests, "cases": [found]})
    assert "- not measured: broken: UserError: " in table
    assert "- failed: tests/test_gpu.py::test_one" in table


def test_tests_are_told_by_outcome_as_far_as_they_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -q -m 'not gpu'\n")
    body = (
        "import pytest, time\npytestmark = pytest.mark.gpu\n\n"
        "@pytest.mark.parametrize('name', ['one', 'a b'])\ndef test_good(name): pass\n"
        "def test_bad(): assert not 'what is wrong'\n"
        "@pytest.fixture\ndef broken(): raise OSError\ndef test_error(broken): pass\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    (tmp_path / "tests" / "test_a.py").write_text(body)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    found = gpu.run_tests(None)
    names = {key: [name.rpartition("::")[2] for name in found[key]] for key in ("passed", "failed", "not run")}
    assert names == {
        "passed": ["test_good[one]", "test_good[a b]"],
        "failed": ["test_bad", "test_error"],
        "not run": ["test_skipped"],
    }
    assert found["ended"] == "with exit code 1"
    assert "what is wrong" in found["printed"]
    (tmp_path / "tests" / "test_a.py").write_text(f"{body}def test_long(): time.sleep(1000)\n")
    found = gpu.run_tests(20)
    assert found["ended"] == "cut off after 20 s"
    assert len(found["passed"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: here is a GPU")
def test_without_a_gpu_the_full_size_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", "--json", str(tmp_path / "gpu.json")])
    assert gpu.main() == 2
    assert capsys.readouterr().err == "error: there is no GPU here; --size tiny shows that it runs\n"
    assert not list(tmp_path.iterdir())


def test_the_headline_recipe_is_measured_in_both_half_precisions_within_ten_minutes() -> None:
    full = gpu.cases("full")
    halves = [[name for name in ("fp16", "bf16") if case.variants["peft"]["training"][name]] for case in full]
    assert halves == [["fp16"], ["bf16"], ["bf16"], ["bf16"]]
    assert [case.options.get("rows") for case in full] == ["guanaco", "guanaco", "alpaca", "alpaca"]
    for case in full:
        assert case.variants["fused"]["training"] == case.variants["peft"]["training"]
        assert case.options["length"] == 1024
    assert gpu.SECONDS["tests"] + sum(gpu.SECONDS[case.options["model"]] for case in full) <= 510
