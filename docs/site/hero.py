"""Draws docs/hero.png from the committed measurements in docs/bench: `python docs/site/hero.py`."""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]
MODELS = {"gpt2": "GPT-2 124M", "qwen2": "Qwen2-0.5B"}
SIDES = {"peft": ("TRL + PEFT", "#9aa5b1"), "fused": ("PlainLoRA", "#c2410c")}


def bars(axes: Axes, values: dict[str, dict[str, float]], unit: str, title: str) -> None:
    """Two bars a model, with their lengths beside them."""
    for row, sides in enumerate(values.values()):
        for place, (side, value) in enumerate(sides.items()):
            height = row + (place - 0.5) * 0.38
            axes.barh(height, value, height=0.34, color=SIDES[side][1], label=SIDES[side][0] if row == 0 else None)
            axes.text(value, height, f"  {value:.1f} {unit}", va="center", fontsize=11)
    axes.set_yticks(range(len(values)), list(values), fontsize=11)
    axes.set_xlim(0, 1.2 * max(max(sides.values()) for sides in values.values()))
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()


def main() -> None:
    """Writes the picture."""
    seconds: dict[str, dict[str, float]] = {}
    gigabytes: dict[str, dict[str, float]] = {}
    for file, name in MODELS.items():
        cases = json.loads((DOCS / "bench" / f"{file}.json").read_text(encoding="utf-8"))["cases"]
        matched = next(case for case in cases if case["table"] == "matched")
        seconds[name] = {side: matched["summary"][side]["median"] for side in SIDES}
        gigabytes[name] = {side: matched["facts"][side]["peak above weights"] / 1e9 for side in SIDES}
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars(left, seconds, "s", "time of an optimizer step")
    bars(right, gigabytes, "GB", "memory above the weights")
    left.legend(frameon=False, loc="upper right", fontsize=11)
    figure.suptitle(
        "LoRA, r=2 on every linear layer, one packed row of 1,024 tokens, fp32, two CPU cores", fontsize=11
    )
    figure.savefig(DOCS / "hero.png", dpi=130)


if __name__ == "__main__":
    main()
