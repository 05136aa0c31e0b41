"""What the benchmark leaves: a table for the terminal, a JSON file, Markdown and a picture beside it."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.case import FLOOR, FUSED, MATCHED, PEFT, Target
from benchmarks.interleave import Outcome
from benchmarks.pictures import draw_ratios, draw_scaling
from benchmarks.ratios import is_met, loss_differences, ratio, title
from benchmarks.scaling import SCALING
from plainlora.markdown import table
from plainlora.report import package_versions, write_json

ABOVE = "peak above weights"
MEMORY = ("peak", ABOVE, "peak reserved", "tensor bytes", "saved bytes")


def amount(value: float) -> str:
    """Bytes for people."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _per_pass(outcome: Outcome, variant: str) -> list[float]:
    return [seconds / outcome.facts[variant].get("passes per iteration", 1) for seconds in outcome.seconds[variant]]


def target_line(outcome: Outcome, target: Target) -> tuple[str, str, str, str]:
    """What is asked, what was measured, the limit, and whether it is met."""
    middle, low, high = ratio(outcome, target.metric, target.variant, target.against)
    met = "met" if middle <= target.at_most else "missed"
    if not target.against:
        return f"{target.metric}, {target.variant}", amount(middle), amount(target.at_most), met
    spread = f" ({low:.2f} to {high:.2f})" if low != high else ""
    return f"{target.metric}, {target.variant} / {target.against}", f"{middle:.2f}{spread}", f"{target.at_most:g}", met


def figures(outcome: Outcome, bold: str = "") -> tuple[list[str], list[list[str]]]:
    """Columns and rows: time, memory, their ratios with what is asked of them, and how far the losses are apart.

    Args:
        outcome: Of one case.
        bold: What stands before and after a ratio that misses its target.
    """
    case = outcome.case
    layer = case.suite == "layer"  # of one layer the process's peak says nothing
    memory = [name for name in (MEMORY if not layer else ("saved bytes",)) if _has(outcome, name, PEFT)]
    pairs = [("time", PEFT), *([("time", FLOOR)] if FLOOR in case.variants else ())]
    pairs += [(name, PEFT) for name in memory]
    pairs = list(dict.fromkeys(pairs + [(target.metric, target.against) for target in case.targets]))
    losses = case.table == MATCHED and _has(outcome, "losses", PEFT)
    rows = []
    for variant in case.variants:
        seconds = _per_pass(outcome, variant)
        row = [variant, *map(duration, (median(seconds), min(seconds), max(seconds)))]
        row += [amount(outcome.facts[variant][name]) if _has(outcome, name, variant) else "" for name in memory]
        row += [_ratio_cell(outcome, metric, variant, against, bold) for metric, against in pairs]
        if losses:
            told = variant != PEFT and _has(outcome, "losses", variant)
            row += [f"{max(loss_differences(outcome, variant)):.0e}" if told else ""]
        rows.append(row)
    columns = ["variant", "median", "min", "max", *memory, *(" / ".join(filter(None, pair)) for pair in pairs)]
    return columns + (["losses differ by at most"] if losses else []), rows


def _has(outcome: Outcome, name: str, variant: str) -> bool:
    return name in outcome.facts[variant]


def _ratio_cell(outcome: Outcome, metric: str, variant: str, against: str, bold: str) -> str:
    """A ratio, with its spread if it has one, and its target if there is one; empty where it says nothing."""
    told = metric == "time" or all(_has(outcome, metric, each) for each in (variant, against) if each)
    asked = [t for t in outcome.case.targets if (t.metric, t.variant, t.against) == (metric, variant, against)]
    if not told or (against not in (PEFT, FLOOR) and not asked):
        return ""
    middle, low, high = ratio(outcome, metric, variant, against)
    spread = f" ({low:.2f} to {high:.2f})" if low != high else ""
    shown = f"{middle:.2f}{spread}" if against else amount(middle)
    if not asked:
        return shown
    mark = "" if is_met(outcome, asked[0]) else bold
    return f"{mark}{shown}{mark}, at most {asked[0].at_most:g}" if against else f"{mark}{shown}{mark}"


def terminal(outcome: Outcome) -> str:
    """One case: its figures, and its targets."""
    case = outcome.case
    if case.not_run:
        return f"\n{title(case)}\n  not run: {case.not_run}"
    lines = ["", title(case), *_aligned(*figures(outcome))]
    for target in case.targets:
        what, measured, limit, met = target_line(outcome, target)
        lines.append(f"  {what}: {measured}, target at most {limit}: {met}")
    columns, rows = profile_rows(outcome)
    return "\n".join(lines + (["", *_aligned(columns, rows)] if rows else []))


def _aligned(columns: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [columns, *rows])
    return ["  " + "  ".join(row).rstrip() for row in cells]


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A table of the targets, if there are any, one of all figures for each case, and one of the scaling."""
    ran = [outcome for outcome in outcomes if not outcome.case.not_run]
    held = [(outcome, target) for outcome in ran for target in outcome.case.targets]
    lines = []
    if held:
        lines.append("In bold: a target that was missed.")
        judged = []
        for outcome, target in held:
            what, measured, limit, met = target_line(outcome, target)
            judged.append([title(outcome.case), what, measured if met == "met" else f"**{measured}**", limit, met])
        lines += ["", table(["case", "what", "measured", "target, at most", ""], judged, right=(2, 3))]
    lines += ["", *(f"- not run: {title(o.case)}: {o.case.not_run}" for o in outcomes if o.case.not_run)]
    for outcome in ran:
        if outcome.case.suite != SCALING:
            columns, rows = figures(outcome, bold="**")
            lines += ["", f"**{title(outcome.case)}**", "", table(columns, rows, right=range(1, len(columns)))]
        columns, rows = profile_rows(outcome)
        if rows:
            lines += ["", table(columns, rows, right=range(1, len(columns)))]
    if points := [outcome for outcome in ran if outcome.case.suite == SCALING]:
        columns, rows = scaling_rows(points)
        heading = f"**{SCALING}: {', '.join(dict.fromkeys(outcome.case.options['shape'] for outcome in points))}**"
        lines += ["", heading, "", table(columns, rows, right=range(1, len(columns)))]
    return "\n".join([*lines, "", describe_machine(), ""])


def scaling_rows(points: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: seconds and bytes of each point on both sides, and their ratios."""
    rows = []
    for outcome in points:
        cells = [outcome.case.name.partition(", ")[2]]
        for variant in (FUSED, PEFT):
            cells += [duration(median(outcome.seconds[variant])), amount(outcome.facts[variant][ABOVE])]
        for metric in ("time", ABOVE):
            cells.append(_ratio_cell(outcome, metric, FUSED, PEFT, ""))
        rows.append([*cells, f"{max(loss_differences(outcome, FUSED)):.0e}"])
    sides = [f"{what}, {variant}" for variant in (FUSED, PEFT) for what in ("time", ABOVE)]
    return ["step", *sides, "time / peft", f"{ABOVE} / peft", "losses differ by at most"], rows


def profile_rows(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the profile: seconds of each kind of operation, by variant; none if none was profiled."""
    profiles = {variant: facts["profile"] for variant, facts in outcome.facts.items() if "profile" in facts}
    kinds: dict[str, float] = next(iter(profiles.values()), {})
    rows = [[kind, *(duration(profile[kind]) for profile in profiles.values())] for kind in kinds]
    return ["one iteration", *profiles], rows


def machine() -> dict[str, Any]:
    """Where it was measured."""
    cpu = platform.processor() or platform.machine()
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        known = {name.strip(): value.strip() for name, value in fields.items()}
        cpu, flags = known.get("model name", cpu), known.get("flags", "")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "cpu features": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()],
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def describe_machine() -> str:
    """The machine and the versions, in a line."""
    here = machine()
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    gpu = f", {here['gpu']}" if here["gpu"] else ""
    features = f" ({', '.join(here['cpu features'])})" if here["cpu features"] else ""
    return f"{here['cpu']}{features}, {here['cores']} cores, {here['memory'] / 2**30:.0f} GiB{gpu}; {versions}."


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Everything that was measured of one case."""
    case = outcome.case
    known: dict[str, Any] = asdict(case)
    if case.not_run:
        return known
    known["seconds"] = {variant: _per_pass(outcome, variant) for variant in case.variants}
    known["facts"] = outcome.facts
    known["summary"] = {
        variant: {
            "median": median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "spread": max(seconds) / min(seconds),
        }
        for variant, seconds in known["seconds"].items()
    }
    known["loss differences"] = {
        variant: max(loss_differences(outcome, variant))
        for variant in case.variants
        if case.table == MATCHED and _has(outcome, "losses", variant) and _has(outcome, "losses", PEFT)
    }
    known["targets"] = []
    for target in case.targets:
        middle, low, high = ratio(outcome, target.metric, target.variant, target.against)
        measured = {"ratio": middle, "lowest": low, "highest": high, "met": is_met(outcome, target)}
        known["targets"].append(asdict(target) | measured)
    return known


def write(outcomes: Sequence[Outcome], path: Path) -> list[Path]:
    """Writes the JSON file, and Markdown and a picture for each suite beside it.

    Args:
        outcomes: Of one or several suites.
        path: Of the JSON file.

    Returns:
        What was written.
    """
    content = {"machine": machine(), "versions": package_versions(), "cases": [to_json(each) for each in outcomes]}
    write_json(path, content)
    notes = path.with_suffix(".md")
    notes.write_text(markdown(outcomes), encoding="utf-8")
    written = [path, notes]
    for suite in dict.fromkeys(outcome.case.suite for outcome in outcomes if not outcome.case.not_run):
        picture = path.with_name(f"{suite}.png")
        draw = draw_scaling if suite == SCALING else draw_ratios
        draw([outcome for outcome in outcomes if outcome.case.suite == suite], picture)
        written.append(picture)
    return written
