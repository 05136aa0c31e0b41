"""Ratios, targets, and what is written, of figures that are made up here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    assert (
        "| fused | 4.00 s | 2.00 s | 10.00 s | 1.00 GB | 0.40 (0.40 to 0.50), at most 0.5 | 0.25, at most 0.8 |"
        in notes
    )


def test_a_missed_target_is_bold_beside_its_figure_and_the_losses_are_told() -> None:
    outcome = make([8.0, 16.0, 4.0])
    outcome.facts["fused"]["losses"], outcome.facts["peft"]["losses"] = [2.0, 3.0, 1.0], [2.0, 3.000003, 1.0]
    notes = report.markdown([outcome])
    row = next(line for line in notes.splitlines() if line.startswith("| fused | "))
    assert "| **0.80 (0.10 to 0.80)**, at most 0.5 | 0.25, at most 0.8 | 1.00 GB | 1e-06 |" in row
    assert "| **0.80 (0.10 to 0.80)** | 0.5 | missed |" in notes
    assert "**" not in report.terminal(outcome)
    assert report.to_json(outcome)["loss differences"]["fused"] == pytest.approx(1e-6, rel=1e-3)


def test_the_floor_has_no_memory_and_every_time_is_given_over_it() -> None:
    outcome = make([4.0, 8.0, 20.0])
    case = replace(outcome.case, variants=outcome.case.variants | {"floor": {}})
    outcome = Outcome(case, outcome.seconds | {"floor": [2.0, 8.0, 8.0]}, outcome.facts | {"floor": {"FLOPs": [1]}})
    columns, rows = report.figures(outcome)
    cells = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["time / floor"] for row in cells] == ["2.00 (1.00 to 2.50)", "5.00 (2.50 to 5.00)", "1.00"]
    assert cells[2]["peak"] == cells[2]["peak / peft"] == ""


def test_scaling_is_one_table_and_one_picture_of_each_axis(tmp_path: Path) -> None:
    found = []
    for case in scaling.cases("full", "cpu"):
        facts = {side: {"peak above weights": 1e9 * n, "losses": [1.0]} for n, side in enumerate(case.variants, 1)}
        found.append(Outcome(case, {side: [1.0 * n] * 3 for n, side in enumerate(case.variants, 1)}, facts))
    for axis, (_, values) in scaling.AXES.items():
        assert {each.case.options["point"][axis] for each in scaling.on_axis(found, axis)} == set(values)
    assert len(found) == 1 + sum(len(values) - 1 for _, values in scaling.AXES.values())
    written = report.write(found, tmp_path / "scaling.json")
    assert [each.name for each in written] == ["scaling.json", "scaling.md", "scaling.png"]
    notes = written[1].read_text()
    assert "| 16 x 256, r=2, answers 1 | 1.00 s | 1.00 GB | 2.00 s | 2.00 GB | 0.50 | 0.50 | 0e+00 |" in notes
    assert notes.count("time / peft") == 1


def test_size_tiny_says_so_in_every_table_and_picture_and_judges_no_target(tmp_path: Path) -> None:
    full, tiny = (
        [case for suite in SUITES for _, case in list_cases(suite, size, "cpu")] for size in ("full", "tiny")
    )
    assert len(full) == len(tiny) > 20
    assert any(case.targets for case in full)
    assert not any(case.targets for case in tiny)
    assert [case.name for case in tiny] == [f"tiny, in place of {case.name}" for case in full]
    for case in {case.suite: case for case in tiny}.values():
        facts: dict[str, dict[str, Any]] = {
            variant: {"peak": 1e9, "peak above weights": 1e8, "saved bytes": 1e6, "losses": [1.0]}
            for variant in case.variants
        }
        outcome = Outcome(case, {variant: [1.0, 2.0] for variant in case.variants}, facts)
        picture = tmp_path / "picture.svg"
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
            pictures.draw_ratios([outcome], picture)
        for shown in (report.terminal(outcome), report.markdown([outcome]), picture.read_text()):
            assert "tiny, in place of " in shown, case.name
            assert "target" not in shown, case.name
