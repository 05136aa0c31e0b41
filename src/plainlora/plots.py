"""Plots of a run's figures."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = {"fused": "#c2410c", "peft": "#9aa5b1", "reference": "#1f4e79"}  # of the back ends, in every picture


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
        rows: `arm`, `method`, `trainable_params`, the score by its name, and `NAME_half_width` (`None` for one seed).
        name: The score's name.
        title: The score in words, with its unit.
        path: The PNG to write.
        factor: What it is multiplied by: 100 for per cent.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        at = (row["trainable_params"], factor * row[name])
        error = factor * (row[f"{name}_half_width"] or 0.0)
        colour = "#c2410c" if row["method"] == "lora" else "#1f4e79"
        axes.errorbar(*at, yerr=error or None, color=colour, marker="o", capsize=4)
        axes.annotate(row["arm"], at, xytext=(7, 5), textcoords="offset points")
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
