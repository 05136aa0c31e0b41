"""Runs the code of docs/from-scratch.md, writes what it prints into the page, and draws the page's pictures.

python docs/site/tutorial.py
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

PAGE = Path(__file__).parents[1] / "from-scratch.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)  # code, and what it printed


def run(page: str, names: dict[str, Any]) -> list[tuple[str, str]]:
    """Runs the blocks in order; each as the page has its output, and what it printed now."""
    found = []
    for code, said in BLOCK.findall(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)  # noqa: S102  # the page's own
        found.append((said, printed.getvalue()))
    return found


def draw_layer(path: Path) -> None:
    """W0 beside A and B, their sides in proportion to 160 inputs, 384 outputs and r=8, drawn four times as wide."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.add_subplot()
    boxes = (
        (40, 0, 96, 40, "#9aa5b1", "W0, frozen\n(160, 384)"),
        (186, 0, 8, 40, "#c2410c", "A, trained\n(160, 8)"),
        (228, 16, 96, 8, "#c2410c", "B, trained (8, 384)"),
    )
    for x, y, width, height, colour, said in boxes:
        axes.add_patch(Rectangle((x, y), width, height, color=colour))
        inside = height > 8 and width > 8
        place = (x + width / 2, y + height / 2 if inside else y - 4)
        axes.text(*place, said, ha="center", va="center" if inside else "top", color="white" if inside else "black")
    for x, said in ((20, "x @ ("), (160, "+  alpha *"), (211, "@"), (336, ")")):
        axes.text(x, 20, said, ha="center", va="center", fontsize=14)
    axes.set(xlim=(0, 350), ylim=(-14, 42))
    axes.set_axis_off()
    figure.savefig(path, dpi=130)


def draw_losses(names: dict[str, Any], path: Path) -> None:
    """The losses of each step: PEFT's lie on ours."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for key, label, options in (
        ("losses", "from scratch", {"color": "#e3a857", "linewidth": 1.2}),
        ("peft_losses", "PEFT", {"color": "#9aa5b1", "linewidth": 4}),
        ("own_losses", "PlainLoRA, the same seed", {"color": "#c2410c", "linewidth": 1.2}),
    ):
        axes.plot(range(1, len(names[key]) + 1), names[key], label=label, **options)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per answer token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the page and writes it and its pictures."""
    names: dict[str, Any] = {}
    page = PAGE.read_text(encoding="utf-8")
    for said, printed in run(page, names):
        print(printed, end="")
        page = page.replace(f"```text\n{said}```", f"```text\n{printed}```", 1) if said else page
    PAGE.write_text(page, encoding="utf-8")
    draw_layer(PAGE.with_name("from-scratch-layer.png"))
    draw_losses(names, PAGE.with_name("from-scratch-loss.png"))


if __name__ == "__main__":
    main()
