"""Learning rate, rank and variant against the final test loss, for `results.json`, `results.md` and a picture.

    python -m docs.what-matters.measure [--seeds 0 1 2] [--name NAME --recipe YAML --rates 1e-4 ...] [-- FLAG ...]

Every run is a recipe for one epoch, with other flags if there are any, and with alpha 32. A run that is in the results
already is not made again.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from docs.measuring import ROOT, run
from plainlora.markdown import table
from plainlora.report import write_json

HERE = Path(__file__).parent
METHODS: dict[str, tuple[str, ...]] = {
    "LoRA, r=2": ("--lora_r", "2"),
    "LoRA, r=8": ("--lora_r", "8"),
    "LoRA, r=32": ("--lora_r", "32"),
    "rsLoRA, r=32": ("--lora_r", "32", "--use_rslora", "true"),
    "DoRA, r=8": ("--lora_r", "8", "--use_dora", "true"),
    "PiSSA, r=8": ("--lora_r", "8", "--lora_config", '{"init_lora_weights": "pissa"}'),
    "LoRA+, r=8": ("--lora_r", "8", "--loraplus_lr_ratio", "16"),
    "full": ("--method", "full"),
}
COLOURS = ("#fdba74", "#f97316", "#9a3412", "#7c3aed", "#1f4e79", "#0f766e", "#be185d", "#6b7280")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
OF_FULL = 1 / 3  # what trains every weight needs lower rates
COMMON = (
    *("--num_train_epochs", "1", "--merge", "false", "--exact_match_rows", "0", "--eval_strategy", "no"),
    *("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--overwrite"),
)


def rates(method: str, of_lora: Sequence[float]) -> list[float]:
    """The rates of a method, to one digit."""
    return [float(f"{rate * (OF_FULL if method == 'full' else 1):.0e}") for rate in of_lora]


def rates_in(results: dict[str, Any], method: str | None = None) -> list[float]:
    """The rates of a method, or of all, for which there are results."""
    found = [key.rsplit(", ", 2) for key in results]
    return sorted({float(rate) for name, rate, _ in found if method in (None, name)})


def train(method: str, rate: float, seed: int, folder: Path, recipe: str, more: tuple[str, ...]) -> dict[str, Any]:
    """One run: the test loss of the base and of the result, in nats a token, and what it took."""
    alpha = () if method == "full" else ("--lora_alpha", "32")
    run(
        *("recipes/sft.py", "--config", recipe, "--output_dir", str(folder), *COMMON),
        *("--learning_rate", str(rate), "--seed", str(seed), *METHODS[method], *alpha, *more),
    )
    results = json.loads((folder / "all_results.json").read_text())
    found = {name: results[name] for name in ("eval_loss_base", "trainable_params", "train_runtime")}
    return found | {"eval_loss": results["eval_loss" if method == "full" else "eval_loss_adapter"]}


def losses(results: dict[str, Any], method: str, rate: float) -> list[float]:
    """The final test losses of all seeds."""
    return [each["eval_loss"] for key, each in results.items() if key.startswith(f"{method}, {rate:g}, ")]


def write_table(name: str, results: dict[str, Any]) -> str:
    """A row a method: the median of the seeds at every rate, and the best of them."""
    columns = rates_in(results)
    rows = []
    for method in METHODS:
        there = {rate: losses(results, method, rate) for rate in rates_in(results, method)}
        medians = {rate: statistics.median(found) for rate, found in there.items() if found}
        if not medians:
            continue
        best = min(medians, key=medians.__getitem__)
        spread = losses(results, method, best)
        cells = [f"{medians[rate]:.3f}" if rate in medians else "" for rate in columns]
        seeds = f" ({min(spread):.3f} to {max(spread):.3f})" if len(spread) > 1 else ""
        rows.append([method, *cells, f"{best:g}", f"{medians[best]:.3f}{seeds}"])
    header = [name, *(f"{rate:g}" for rate in columns), "best rate", "there"]
    return table(header, rows, right=range(1, len(header)))


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """The median of the seeds against the rate, a line a method, with the lowest and the highest."""
    figure = Figure(figsize=(5.2 * len(results) + 1.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, found) in zip(panels, results.items(), strict=True):
        for method, colour in zip(METHODS, COLOURS, strict=True):
            there = [(rate, losses(found, method, rate)) for rate in rates_in(found, method)]
            if there:
                x, seeds = zip(*there, strict=True)
                axes.plot(x, list(map(statistics.median, seeds)), color=colour, marker="o", ms=4, label=method)
                axes.fill_between(x, list(map(min, seeds)), list(map(max, seeds)), color=colour, alpha=0.12)
        base = next(iter(found.values()))["eval_loss_base"]
        axes.axhline(base, color="#9aa5b1", linestyle=":", label=f"base ({base:.2f})")
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="test loss (nats per token)", title=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Makes the runs that are missing; writes the files after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--name", default="quickstart's base", help="of the base, in the results")
    parser.add_argument("--recipe", default="recipes/quickstart/lora.yaml")
    parser.add_argument(
        "--rates", nargs="*", type=float, default=list(RATES), help="of LoRA; a third of them for full"
    )
    parser.add_argument("--work", default="outputs/what-matters")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="more of the recipe's flags")
    args = parser.parse_args()
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    file = HERE / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    found = results.setdefault(args.name, {})
    wanted = [
        (seed, method, rate) for seed in args.seeds for method in args.methods for rate in rates(method, args.rates)
    ]
    for seed, method, rate in tqdm(wanted):
        key = f"{method}, {rate:g}, seed {seed}"
        if key not in found:
            found[key] = train(method, rate, seed, ROOT / args.work, args.recipe, tuple(args.flags))
            write_json(file, results)
    tables = [write_table(name, each) for name, each in results.items()]
    (HERE / "results.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    draw(results, HERE / "loss.png")


if __name__ == "__main__":
    main()
