"""Ratios, targets, and what is written, of figures that are made up here."""

import json
from pathlib import Path

import matplotlib
import pytest

from benchmarks import pictures, ratios, report, scaling
from benchmarks.case import Case, Target
from benchmarks.interleave import Outcome
from benchmarks.suites import SUITES, list_cases

TARGETS = (Target("time", "peft", 0.5), Target("peak", "peft", 0.8), Target("peak", "", 2e9))


def make(fused: list[float]) -> Outcome:
    case = Case("head", "one", {"fused": {}, "peft": {}}, table="matched", targets=TARGETS)
    facts = {"fused": {"peak": 1e9, "passes per iteration": 2}, "peft": {"peak": 4e9, "passes per iteration": 2}}
    return Outcome(case, {"fused": fused, "peft": [10.0, 20.0, 40.0]}, facts)


def test_times_are_divided_round_by_round() -> None:
    # The medians' quotient would be 8 / 20 = 0.4.
    assert ratios.ratio(make([8.0, 6.0, 12.0]), "time", "fused", "peft") == (0.3, 0.3, 0.8)


@pytest.mark.parametrize(("fused", "met"), [([4.0, 8.0, 20.0], True), ([8.0, 16.0, 4.0], False)])
def test_a_target_is_held_against_the_median_ratio(fused: list[float], met: bool) -> None:
    outcome = make(fused)
    assert [ratios.is_met(outcome, target) for target in TARGETS] == [met, True, True]
    shown = report.terminal(outcome)
    assert ("target at most 0.5: met" in shown) == met
    assert ("target at most 0.5: missed" in shown) != met
    assert "peak, fused: 1.00 GB, target at most 2.00 GB: met" in shown


def test_json_markdown_and_picture_hold_everything(tmp_path: Path) -> None:
    skipped = Outcome(Case("llama2", "two", {"fused": {}}, not_run="no GPU"))
    path = tmp_path / "new" / "bench.json"
    written = report.write([make([4.0, 8.0, 20.0]), skipped], path)
    assert [each.name for each in written] == ["bench.json", "bench.md", "head.png"]
    assert all(each.stat().st_size > 0 for each in written)
    content = json.loads(path.read_text())
    first, second = content["cases"]
    assert first["seconds"] == {"fused": [2.0, 4.0, 10.0], "peft": [5.0, 10.0, 20.0]}  # of one pass
    assert first["summary"]["fused"] == {"median": 4.0, "min": 2.0, "max": 10.0, "spread": 5.0}
    assert [target["met"] for target in first["targets"]] == [True, True, True]
    assert first["targets"][0]["ratio"] == 0.4
    assert second["not_run"] == "no GPU"
    assert {"cpu", "cores", "memory", "threads"} <= content["machine"].keys()
    assert {"torch", "trl", "peft"} <= content["versions"].keys()
    notes = written[1].read_text()
    assert "| head: one (matched) | time, fused / peft | 0.40 (0.40 to 0.50) | 0.5 | met |" in notes
    assert "- not run: llama2: two: no GPU" in notes


def test_size_tiny_says_so_in_every_table_and_picture_and_judges_no_target(tmp_path: Path) -> None:
    full, tiny = (
        [case for suite in SUITES for _, case in list_cases(suite, size, "cpu")] for size in ("full", "tiny")
    )
    assert len(full) == len(tiny) > 20
    assert any(case.targets for case in full)
    assert not any(case.targets for case in tiny)
    assert [case.name for case in tiny] == [f"tiny, in place of {case.name}" for case in full]
    for case in {case.suite: case for case in tiny}.values():
        facts = {variant: {"peak": 1e9, "saved bytes": 1e6} for variant in case.variants}
        outcome = Outcome(case, {variant: [1.0, 2.0] for variant in case.variants}, facts)
        picture = tmp_path / "picture.svg"
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
            pictures.draw_ratios([outcome], picture)
        for shown in (report.terminal(outcome), report.markdown([outcome]), picture.read_text()):
            assert "tiny, in place of " in shown, case.name
            assert "target" not in shown, case.name
