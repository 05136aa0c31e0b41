"""Plots of a run's figures."""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

COLOURS = {"fused": "#c2410c", "peft": "#9aa5b1", "reference": "#1f4e79"}  # of the back ends, in every picture
SIZES = LinearSegmentedColormap.from_list("sizes", ["#fff7ed", "#c2410c"])
SIGNED = LinearSegmentedColormap.from_list("signed", ["#1f4e79", "#ffffff", "#c2410c"])


def plot_loss(
    history: list[dict[str, Any]],
    base_loss: float | None,
    path: str | Path,
    unit: str = "token",
    rows: str = "test",
) -> None:
    """Training and evaluation loss against optimizer steps; the base's loss as a dotted line.

    Args:
        history: `trainer.state.log_history`.
        base_loss: Loss of the base alone on the same rows, in nats, if it was measured.
        path: The PNG to write.
        unit: What the loss is a mean over.
        rows: Which rows are evaluated during training.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")  # not pyplot, which may open a window
    axes = figure.add_subplot()
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    test = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if train:
        axes.plot(*zip(*train, strict=True), color="#9aa5b1", linewidth=1.5, label="training rows")
    if test:
        axes.plot(*zip(*test, strict=True), color="#c2410c", marker="o", markersize=4, label=f"{rows} rows")
    if base_loss is not None:
        axes.axhline(base_loss, color="#1f4e79", linestyle=":", label=f"{rows} rows, base model ({base_loss:.2f})")
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats per {unit})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_confusion(labels: Sequence[str], tables: dict[str, list[list[int]]], path: str | Path) -> None:
    """Confusion matrices side by side: rows are the true classes, columns the predicted ones.

    Args:
        labels: Names of the classes.
        tables: Title of each matrix, and the matrix.
        path: The PNG to write.
    """
    side = max(3.2, 0.55 * len(labels) + 1.6)
    figure = Figure(figsize=(side * len(tables), side), layout="constrained")
    for at, (title, table) in enumerate(tables.items(), 1):
        axes = figure.add_subplot(1, len(tables), at)
        shares = [[count / max(sum(row), 1) for count in row] for row in table]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        right = sum(table[number][number] for number in range(len(labels)))
        axes.set_title(f"{title}\n{right:,} of {sum(map(sum, table)):,} right", fontsize=10)
        tilt, align = (45, "right") if sum(map(len, labels)) > 24 else (0, "center")
        axes.set_xticks(range(len(labels)), labels, rotation=tilt, ha=align, rotation_mode="anchor")
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="predicted", ylabel="true")
        if len(labels) <= 12:
            for row, counts in enumerate(table):
                for column, count in enumerate(counts):
                    color = "white" if shares[row][column] > 0.6 else "#1f2937"
                    axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    figure.savefig(path, dpi=150)


def plot_against_size(
    rows: Sequence[dict[str, Any]], name: str, title: str, path: str | Path, factor: int = 1
) -> None:
    """A score against trained parameters, with a labelled point and a confidence interval for each variant.

    Args:
        rows: `variant`, `method`, `trainable_params`, the score by its name, and `NAME_half_width` (`None` for one
            seed).
        name: The score's name.
        title: The score in words, with its unit.
        path: The PNG to write.
        factor: The score is multiplied by it: 100 for per cent.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        at = (row["trainable_params"], factor * row[name])
        error = factor * (row[f"{name}_half_width"] or 0.0)
        colour = "#c2410c" if row["method"] == "lora" else "#1f4e79"
        axes.errorbar(*at, yerr=error or None, color=colour, marker="o", capsize=4)
        axes.annotate(row["variant"], at, xytext=(7, 5), textcoords="offset points")
    heading = title.partition(",")[0].capitalize()
    axes.set(xscale="log", xlabel="trained parameters", ylabel=title, title=f"{heading} against size")
    axes.margins(x=0.2, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    figure.savefig(path, dpi=150)


def plot_trials(values: Sequence[tuple[int, float]], metric: str, maximize: bool, path: str | Path) -> None:
    """Every trial's value, and the best so far as a staircase.

    Args:
        values: Number and value of each finished trial, in order.
        metric: What the values are.
        maximize: Whether more is better.
        path: The PNG to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    best = list(accumulate((value for _, value in values), max if maximize else min))
    axes.plot(*zip(*values, strict=True), color="#9aa5b1", marker="o", linestyle="none", label="trial")
    numbers = [number for number, _ in values]
    axes.plot(numbers, best, color="#c2410c", drawstyle="steps-post", label="best so far")
    axes.set(xlabel="trial", ylabel=metric, title="Hyperparameter search")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_diff(adapters: Sequence[str], modules: dict[str, dict[str, Any]], path: str | Path) -> None:
    """The norm of each adapter's delta by layer and projection, and the cosine between two, or the rank that one uses.

    Args:
        adapters: Their folders.
        modules: For each module `adapters`, with `r`, `norm`, `relative_norm` and `used_rank` or `None` for each, and
            `cosine`; as in `diff.json`.
        path: The PNG to write.
    """
    sizes = [size for each in modules.values() for size in each["adapters"] if size is not None]
    relative = all("relative_norm" in size for size in sizes)
    key, unit, style = ("relative_norm", "norm / base's norm", ".0%") if relative else ("norm", "norm", ".2g")

    def values_of(number: int, key: str) -> dict[str, float | None]:
        return {name: (each["adapters"][number] or {}).get(key) for name, each in modules.items()}

    places = _places(modules)
    layers = sorted({layer for layer, _ in places.values()})
    height, width = (
        0.36 * len({kind for _, kind in places.values()}) + 1.4,
        min(max(2.8, 0.34 * len(layers) + 0.9), 5.0),
    )
    figure = Figure(figsize=(1.5 + width * (len(adapters) + 1), height), layout="constrained")
    *left, right = figure.subplots(1, len(adapters) + 1, sharey=True)
    top = max((size[key] or 0.0 for size in sizes), default=0.0) or 1.0
    for number, (axes, adapter) in enumerate(zip(left, adapters, strict=True)):
        image = _draw_layers(axes, places, values_of(number, key), SIZES, (0.0, top), style)
        axes.set_title(adapter if len(adapter) < 28 else f"...{adapter[-25:]}", fontsize=10)
    figure.colorbar(image, ax=left, label=unit).outline.set_visible(False)
    if len(adapters) > 1:
        cosines = {name: each["cosine"] for name, each in modules.items()}
        image = _draw_layers(right, places, cosines, SIGNED, (-1.0, 1.0), ".2f")
        figure.colorbar(image, ax=right, label="cosine").outline.set_visible(False)
        right.set_title("between the two", fontsize=10)
    else:
        most = max((size["r"] for size in sizes), default=1)
        image = _draw_layers(right, places, values_of(0, "used_rank"), SIZES, (0.0, most), ".0f")
        figure.colorbar(image, ax=right, label="rank", ticks=MaxNLocator(integer=True)).outline.set_visible(False)
        right.set_title("rank that holds 99 %", fontsize=10)
    figure.savefig(path, dpi=150)


def _draw_layers(
    axes: Axes,
    places: dict[str, tuple[int, str]],
    values: dict[str, float | None],
    colours: Colormap,
    limits: tuple[float, float],
    style: str,
) -> AxesImage:
    """A cell for each module, layers from left to right; grey where there is no value."""
    layers = sorted({layer for layer, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    cells = [[math.nan] * len(layers) for _ in kinds]
    for name, (layer, kind) in places.items():
        row, column, value = kinds.index(kind), layers.index(layer), values[name]
        if value is None:
            continue
        cells[row][column] = value
        if len(layers) <= 12:
            colour = "white" if abs(value) > 0.7 * limits[1] else "#1f2937"
            axes.text(column, row, format(value, style), ha="center", va="center", color=colour, fontsize=8)
    step = math.ceil(len(layers) / 12)
    axes.set_facecolor("#e5e7eb")
    axes.set_xticks(range(0, len(layers), step), list(map(str, layers[::step])))
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    axes.spines[:].set_visible(False)
    return axes.imshow(cells, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")


def _places(modules: Iterable[str]) -> dict[str, tuple[int, str]]:
    """The number of each module's layer, 0 if it is in none, and its name inside the layer.

    What stands before the number is kept where there are several such, as of an encoder and a decoder.
    """
    found = {name: re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.*)", name) for name in modules}
    several = len({match[1] for match in found.values() if match}) > 1
    places = {}
    for name, match in found.items():
        if match is None:
            places[name] = 0, name.rpartition(".")[2]
        else:
            places[name] = int(match[2]), f"{match[1]}.{match[3]}" if several else match[3]
    return places
