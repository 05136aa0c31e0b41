"""Pictures of what was measured."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.case import FLOOR, FUSED, PEFT
from benchmarks.interleave import Outcome
from benchmarks.ratios import ratio, title
from benchmarks.scaling import AXES, on_axis
from plainlora.plots import COLOURS

OTHER_COLOURS = ("#4d7c5a", "#e3a857", "#7c5295", "#a8c5da", "#8a6d3b")


def draw_ratios(outcomes: Sequence[Outcome], path: Path) -> None:
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
            title(outcome.case).partition(": ")[2],
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


def draw_scaling(outcomes: Sequence[Outcome], path: Path) -> None:
    """Seconds and memory of a step against length, rank, batch and share of answer tokens, on logarithmic scales."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharey="row")
    for column, (axis, (label, values)) in zip(grid.T, AXES.items(), strict=True):
        points = sorted(on_axis(outcomes, axis), key=lambda outcome: outcome.case.options["point"][axis])
        places = [outcome.case.options["point"][axis] for outcome in points]
        for side in (PEFT, FUSED):
            seconds = [median(outcome.seconds[side]) for outcome in points]
            gigabytes = [outcome.facts[side]["peak above weights"] / 1e9 for outcome in points]
            name = "TRL + PEFT" if side == PEFT else "PlainLoRA"
            for axes, heights in zip(column, (seconds, gigabytes), strict=True):
                axes.plot(places, heights, marker="o", color=COLOURS[side], label=name)
        for axes in column:
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel(label)
    grid[0, 0].set_ylabel("seconds a step")
    grid[1, 0].set_ylabel("GB above the weights")
    grid[0, 0].legend(frameon=False)
    figure.suptitle(", ".join(dict.fromkeys(outcome.case.options["shape"] for outcome in outcomes)), fontsize=10)
    figure.savefig(path, dpi=130)
