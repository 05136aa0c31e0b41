"""What the benchmark leaves: a table for the terminal, a JSON file, Markdown and a picture beside it."""

import itertools
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.case import FLOOR, PEFT, Case, Target
from benchmarks.interleave import Outcome
from plainlora.markdown import table
from plainlora.plots import COLOURS
from plainlora.report import package_versions, write_json

OTHER_COLOURS = ("#4d7c5a", "#e3a857", "#7c5295", "#a8c5da", "#8a6d3b")
MEMORY = ("peak", "peak above weights", "peak reserved", "tensor bytes", "saved bytes")


def ratio(outcome: Outcome, metric: str, variant: str, against: str) -> tuple[float, float, float]:
    """Median, lowest and highest of `variant / against` (dimensionless); of one number where the metric does not vary.

    Times are divided round by round: whatever slowed the machine for a while slowed both.
    """
    if metric == "time":
        each = [a / b for a, b in zip(outcome.seconds[variant], outcome.seconds[against], strict=True)]
        return median(each), min(each), max(each)
    one = outcome.facts[variant][metric] / (outcome.facts[against][metric] if against else 1)
    return one, one, one


def is_met(outcome: Outcome, target: Target) -> bool:
    """Whether the median ratio, or the number, is within the target."""
    return ratio(outcome, target.metric, target.variant, target.against)[0] <= target.at_most


def amount(value: float) -> str:
    """Bytes for people."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _per_pass(outcome: Outcome, variant: str) -> list[float]:
    return [seconds / outcome.facts[variant].get("passes per iteration", 1) for seconds in outcome.seconds[variant]]


def _title(case: Case) -> str:
    return f"{case.suite}: {case.name}" + (f" ({case.table})" if case.table else "")


def target_line(outcome: Outcome, target: Target) -> tuple[str, str, str, str]:
    """What is asked, what was measured, the limit, and whether it is met."""
    middle, low, high = ratio(outcome, target.metric, target.variant, target.against)
    met = "met" if middle <= target.at_most else "missed"
    if not target.against:
        return f"{target.metric}, {target.variant}", amount(middle), amount(target.at_most), met
    spread = f" ({low:.2f} to {high:.2f})" if low != high else ""
    return f"{target.metric}, {target.variant} / {target.against}", f"{middle:.2f}{spread}", f"{target.at_most:g}", met


def figures(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: median, minimum and maximum of the time, its ratio to PEFT's, and memory."""
    memory = [name for name in MEMORY if all(name in facts for facts in outcome.facts.values())]
    if outcome.case.suite == "layer":
        memory = ["saved bytes"]  # of one layer the process's peak says nothing
    rows = []
    for variant in outcome.case.variants:
        seconds = _per_pass(outcome, variant)
        middle, low, high = ratio(outcome, "time", variant, PEFT)
        row = [
            variant,
            *map(duration, (median(seconds), min(seconds), max(seconds))),
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
        ]
        rows.append(row + [amount(outcome.facts[variant][name]) for name in memory])
    return ["variant", "median", "min", "max", "time / peft", *memory], rows


def terminal(outcome: Outcome) -> str:
    """One case: its figures, and its targets."""
    case = outcome.case
    if case.not_run:
        return f"\n{_title(case)}\n  not run: {case.not_run}"
    lines = ["", _title(case), *_aligned(*figures(outcome))]
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
    """A table of the targets, if there are any, and one of all figures for each case."""
    ran = [outcome for outcome in outcomes if not outcome.case.not_run]
    held = [(outcome, target) for outcome in ran for target in outcome.case.targets]
    judged = [[_title(outcome.case), *target_line(outcome, target)] for outcome, target in held]
    lines = [table(["case", "what", "measured", "target, at most", ""], judged, right=(2, 3))] if held else []
    lines += ["", *(f"- not run: {_title(o.case)}: {o.case.not_run}" for o in outcomes if o.case.not_run)]
    for outcome in ran:
        columns, rows = figures(outcome)
        lines += ["", f"**{_title(outcome.case)}**", "", table(columns, rows, right=range(1, len(columns)))]
        columns, rows = profile_rows(outcome)
        if rows:
            lines += ["", table(columns, rows, right=range(1, len(columns)))]
    return "\n".join([*lines, "", describe_machine(), ""])


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


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """A bar for each variant: its time over PEFT's, with the lowest and highest round; PEFT is the line at 1."""
    ran = [outcome for outcome in outcomes if not outcome.case.not_run]
    bars = sum(len(outcome.case.variants) + 1 for outcome in ran)
    figure = Figure(figsize=(9, 1.2 + 0.24 * bars), layout="constrained")
    axes = figure.add_subplot()
    shown = dict.fromkeys(variant for outcome in ran for variant in outcome.case.variants)
    others = [variant for variant in (FLOOR, *shown) if variant not in COLOURS]
    colours = COLOURS | dict(zip(dict.fromkeys(others), itertools.cycle(OTHER_COLOURS), strict=False))
    place = 0.0
    for outcome in ran:
        axes.annotate(
            _title(outcome.case).partition(": ")[2],
            (0, place),
            (4, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
        )
        place += 1
        for variant in outcome.case.variants:
            middle, low, high = ratio(outcome, "time", variant, PEFT)
            axes.barh(place, middle, color=colours[variant], height=0.8)
            axes.plot((low, high), (place, place), color="#111827", linewidth=1)
            axes.annotate(
                f"{middle:.2f}",
                (max(middle, high), place),
                (4, 0),
                textcoords="offset points",
                fontsize=7,
                va="center",
            )
            place += 1
        place += 0.4
    handles = [axes.barh(0, 0, color=colours[variant], label=variant) for variant in shown]
    axes.axvline(1, color="#9aa5b1", linestyle=":")
    axes.set(xlabel="time / PEFT's time", ylim=(place, -1))
    # One slow round would squeeze all bars; its whisker then leaves the picture.
    highest = max((ratio(o, "time", v, PEFT)[0] for o in ran for v in o.case.variants), default=1.0)
    axes.set_xlim(0, min(axes.get_xlim()[1], 1.6 * max(highest, 1.0)))
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


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
        plot([outcome for outcome in outcomes if outcome.case.suite == suite], picture)
        written.append(picture)
    return written
