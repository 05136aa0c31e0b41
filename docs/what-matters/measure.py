"""Learning rate, rank and variant against the final test loss, for `losses/`, `results.md` and a picture.

    python -m docs.what-matters.measure quickstart
    python -m docs.what-matters.measure smollm2 --model PATH --alpaca FILE

Every run is one epoch of a recipe, with alpha 32. A run that is in `losses/` already is not made again. The second
base is SmolLM2-135M-Instruct on this disk; its rows are short ones of Alpaca (instruction, input, output).
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, StrMethodFormatter
from tqdm import tqdm

from docs.measuring import ROOT, instruct_rows, run, write_rows
from plainlora.markdown import table
from plainlora.report import write_json

HERE = Path(__file__).parent
LOSSES = HERE / "losses"
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
COMMON = (
    *("--num_train_epochs", "1", "--merge", "false", "--exact_match_rows", "0", "--eval_strategy", "no"),
    *("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--overwrite"),
)
LONGEST, TRAIN_ROWS, TEST_ROWS = 128, 384, 100  # of Alpaca


@dataclass(frozen=True, slots=True)
class Base:
    """A model, its recipe with these flags, and the rates of LoRA; full fine-tuning takes this share of them."""

    title: str
    recipe: str
    rates: tuple[float, ...]
    share_of_full: float
    flags: tuple[str, ...] = ()


BASES = {
    "quickstart": Base(
        "quickstart's base", "recipes/quickstart/lora.yaml", (3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2), 1 / 3
    ),
    "smollm2": Base(
        "SmolLM2-135M-Instruct",
        "recipes/instruct/lora.yaml",
        (1e-4, 3e-4, 1e-3, 3e-3),
        1 / 10,
        ("--max_length", "512", "--per_device_train_batch_size", "1", "--max_new_tokens", "1"),
    ),
}


@dataclass(frozen=True, slots=True)
class Loss:
    """The test losses of a run and of its base, in nats a token, and what it took, in seconds."""

    method: str
    rate: float
    seed: int
    eval_loss: float
    eval_loss_base: float
    trainable_params: int
    train_runtime: float


def read(name: str) -> list[Loss]:
    """The runs of a base."""
    file = LOSSES / f"{name}.json"
    return [Loss(**each) for each in json.loads(file.read_text())] if file.exists() else []


def train(base: Base, method: str, rate: float, seed: int, folder: Path, more: Sequence[str]) -> Loss:
    """One run of the recipe."""
    alpha = () if method == "full" else ("--lora_alpha", "32")
    run(
        *("recipes/sft.py", "--config", base.recipe, "--output_dir", str(folder), *COMMON, *base.flags, *more),
        *("--learning_rate", str(rate), "--seed", str(seed), *METHODS[method], *alpha),
    )
    results = json.loads((folder / "all_results.json").read_text())
    return Loss(
        *(method, rate, seed, results["eval_loss" if method == "full" else "eval_loss_adapter"]),
        *(results[name] for name in ("eval_loss_base", "trainable_params", "train_runtime")),
    )


def by_rate(losses: Iterable[Loss], method: str) -> dict[float, list[float]]:
    """The final test losses of all seeds at every rate of a method, from the lowest."""
    found: dict[float, list[float]] = {}
    for loss in sorted(losses, key=lambda each: (each.rate, each.seed)):
        if loss.method == method:
            found.setdefault(loss.rate, []).append(loss.eval_loss)
    return found


def write_table(title: str, losses: list[Loss]) -> str:
    """A row a method: the median of the seeds at every rate; the best of them, with its seeds."""
    columns = sorted({loss.rate for loss in losses})
    rows = []
    for method in METHODS:
        seeds = by_rate(losses, method)
        medians = {rate: statistics.median(found) for rate, found in seeds.items()}
        if not medians:
            continue
        best = min(medians, key=medians.__getitem__)
        spread = f" ({min(seeds[best]):.3f} to {max(seeds[best]):.3f}, {len(seeds[best])} seeds)"
        cells = [f"{medians[rate]:.3f}" if rate in medians else "" for rate in columns]
        rows.append([method, *cells, f"{best:g}", f"{medians[best]:.3f}{spread if len(seeds[best]) > 1 else ''}"])
    header = [title, *(f"{rate:g}" for rate in columns), "best rate", "there"]
    return table(header, rows, right=range(1, len(header)))


def draw(bases: dict[str, list[Loss]], path: Path) -> None:
    """The median of the seeds against the rate, a line a method, with the lowest and the highest."""
    figure = Figure(figsize=(5.2 * len(bases) + 1.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(bases), squeeze=False)[0]
    for axes, (title, losses) in zip(panels, bases.items(), strict=True):
        for method, colour in zip(METHODS, COLOURS, strict=True):
            seeds = by_rate(losses, method)
            if seeds:
                rates, found = list(seeds), list(seeds.values())
                axes.plot(rates, [*map(statistics.median, found)], color=colour, marker="o", ms=4, label=method)
                axes.fill_between(rates, [*map(min, found)], [*map(max, found)], color=colour, alpha=0.12)
        base = losses[0].eval_loss_base
        axes.axhline(base, color="#9aa5b1", linestyle=":", label="base")
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="test loss (nats per token)", title=title)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=150)


def write() -> None:
    """The tables and the picture of all bases that have losses."""
    bases = {base.title: read(name) for name, base in BASES.items() if read(name)}
    tables = [write_table(title, losses) for title, losses in bases.items()]
    (HERE / "results.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    draw(bases, HERE / "loss.png")


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--model", metavar="PATH", help="SmolLM2-135M-Instruct")
    parser.add_argument("--alpaca", metavar="FILE", help="its rows")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rates", nargs="*", type=float, help="of LoRA, others than the base's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--work", default="outputs/what-matters")
    return parser


def main() -> None:
    """Makes the runs that are missing; writes the losses after each."""
    parser = build_parser()
    args = parser.parse_args()
    if args.base == "smollm2" and not (args.model and args.alpaca):
        parser.error("smollm2 needs --model and --alpaca")
    base, work = BASES[args.base], ROOT / args.work / args.base
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    more: list[str] = []
    if args.base == "smollm2":
        rows = instruct_rows(args.alpaca, args.model, LONGEST, TRAIN_ROWS + TEST_ROWS)
        write_rows(work / "rows", test=rows[:TEST_ROWS], train=rows[TEST_ROWS:])
        more = ["--model_name_or_path", args.model, "--dataset_name", str(work / "rows")]
    losses = read(args.base)
    made = {(loss.method, loss.rate, loss.seed) for loss in losses}
    wanted = [
        (method, float(f"{rate * (base.share_of_full if method == 'full' else 1):.0e}"), seed)
        for seed in args.seeds
        for method in args.methods
        for rate in args.rates or base.rates
    ]
    missing = [each for each in wanted if each not in made]

    def make(number: int) -> Loss:
        return train(base, *missing[number], work / f"run{number}", more)

    LOSSES.mkdir(exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for loss in tqdm(pool.map(make, range(len(missing))), total=len(missing)):
            losses.append(loss)
            losses.sort(key=lambda each: (list(METHODS).index(each.method), each.rate, each.seed))
            write_json(LOSSES / f"{args.base}.json", [asdict(each) for each in losses])
    write()


if __name__ == "__main__":
    main()
