"""A comparison of finetuning modes and settings: every variant under every seed, means and confidence intervals."""

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t  # type: ignore[import-untyped]

from plainlora.errors import UserError
from plainlora.experiments.runs import FINETUNING_MODES, duration, flag_names, locked_folder, resolve, run_recipe
from plainlora.experiments.scores import Score, judging_of, read_figure
from plainlora.markdown import table
from plainlora.plots import plot_against_size
from plainlora.report import package_versions, write_json
from plainlora.settings.checks import ADAPTER_SETTINGS
from plainlora.settings.parsing import read_yaml
from plainlora.settings.programs import find_program
from plainlora.settings.secrets import without_secrets

CONFIDENCE = 0.95
REFUSED_FLAGS = {"seed": "use --seeds", "method": "every method is compared; to compare some, give several --config"}
FIGURES = ("method", "trainable_params", "total_params", "train_runtime", "peak_memory_bytes")


@dataclass(frozen=True)
class Variant:
    """One row of the table: a config, and flags that may change its method."""

    name: str
    config: str
    flags: tuple[str, ...] = ()


def find_variants(configs: Sequence[str], flags: Sequence[str] = ()) -> list[Variant]:
    """The variants to compare, with all configs and flags checked.

    Several configs are one variant each. A single config stands for all YAMLs of its folder; each method that none of
    these has is added as the given config with that `--method`, unless that config loads its base in 4 or 8 bits.

    Raises:
        UserError: A config cannot be read or is given twice, or a flag is refused.
    """
    given = Path(configs[0])
    beside: list[str] = []
    if len(configs) == 1:
        beside = [str(path) for path in given.parent.glob("*.yaml") if path.name != given.name]
    variants = [Variant(name, config) for name, config in _named([*configs, *beside])]
    settings = {variant.name: resolve(variant.config, flags, REFUSED_FLAGS) for variant in variants}
    methods = {name: its["method"] for name, its in settings.items()}
    programs = {find_program(variant.config, flags).path: variant.config for variant in variants}
    if len(programs) > 1:
        (one, its), (other, others) = programs.items()
        raise UserError(f"--config: {its} is a recipe of {one} and {others} of {other}; compare those of one program")
    missing = [method for method in FINETUNING_MODES if len(configs) == 1 and method not in methods.values()]
    if missing and (quantized := _quantization(settings[given.stem])):
        print(
            f"{', '.join(missing)}: not compared, as {given} sets {quantized}, and these train the base's own weights",
            flush=True,
        )
        missing = []
    for method in missing:
        name = method if method not in methods else f"{given.stem}-{method}"
        variants.append(Variant(name, configs[0], (f"--method={method}",)))
        methods[name] = method
    _check_adapters(methods, flags)
    return variants if len(configs) > 1 else sorted(variants, key=lambda each: (_place(each.name), each.name))


def _quantization(settings: Mapping[str, Any]) -> str | None:
    """The setting that loads the base in 4 or 8 bits, if one does."""
    return next((name for name in ("load_in_4bit", "load_in_8bit") if settings[name]), None)


def _check_adapters(methods: Mapping[str, str], flags: Sequence[str]) -> None:
    """Raises `UserError` if a flag of every run is for an adapter, and some variant trains none."""
    others = [name for name, method in methods.items() if method != "lora"]
    for name in ADAPTER_SETTINGS:
        if others and name in flag_names(flags):
            raise UserError(
                f"--{name} cannot stand after the --: {', '.join(others)} train no adapter; set it in a recipe with "
                "method lora, or compare such recipes alone: give several --config"
            )


def _without_adapter(variants: Sequence[Variant], output: Path) -> list[Variant]:
    """The variants, where an added method has a copy of the recipe without the settings of an adapter, in `output`."""
    added = [variant for variant in variants if variant.flags and "--method=lora" not in variant.flags]
    content = read_yaml(added[0].config) if added else {}
    names = [name for name in ADAPTER_SETTINGS if name in content]
    if not names:
        return list(variants)
    print(
        f"{', '.join(variant.name for variant in added)}: train no adapter, so {', '.join(names)} of "
        f"{added[0].config} are left out of them",
        flush=True,
    )
    copy = output / "no_adapter.yaml"
    kept = {name: value for name, value in content.items() if name not in names}
    copy.touch(mode=0o600)  # `env` may hold passwords
    copy.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return [replace(variant, config=str(copy)) if variant in added else variant for variant in variants]


def _place(name: str) -> int:
    if name in FINETUNING_MODES:
        return {"last_layers": 0, "lora": 1, "full": 3}[name]
    return 2 if name.startswith("lora_") else 4


def _named(configs: Sequence[str]) -> list[tuple[str, str]]:
    """The files with their names, prefixed by their folders' names if they would not be unique."""
    names = [Path(config).stem for config in configs]
    if len(set(names)) < len(names):
        names = [f"{Path(config).absolute().parent.name}-{Path(config).stem}" for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--config: {name} is given twice; keep one of them")
    return list(zip(names, configs, strict=True))


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its confidence interval by Student's t: t(n-1) s / sqrt(n); `None` for a single value."""
    if len(values) < 2:
        return statistics.fmean(values), None
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def summarise(variant: str, runs: Sequence[dict[str, Any]], scores: Sequence[Score]) -> dict[str, Any]:
    """One row of the table.

    Args:
        variant: The variant's name.
        runs: Its finished runs, one for each seed.
        scores: The figures to compare.
    """
    row: dict[str, Any] = {"variant": variant, "seeds": [run["seed"] for run in runs]}
    for name in (score.name for score in scores):
        mean, half_width = mean_and_half_width([run[name] for run in runs])
        row |= {name: mean, f"{name}_half_width": half_width}
    for name in ("train_runtime", "peak_memory_bytes"):
        row[name] = statistics.fmean(run[name] for run in runs)
    return row | {name: runs[0][name] for name in ("method", "trainable_params", "total_params")}


def markdown(rows: Sequence[dict[str, Any]], scores: Sequence[Score]) -> str:
    """The table in Markdown."""
    unit, size = ("GB", 1e9) if max(row["peak_memory_bytes"] for row in rows) >= 1e9 else ("MB", 1e6)
    lora = next((row for row in rows if row["method"] == "lora"), None)
    header = [
        "variant",
        *(score.heading for score in scores),
        "trained parameters",
        "of all",
        "time, s",
        f"memory, {unit}",
    ]
    lines = []
    for row in rows:
        trained = f"{row['trainable_params']:,}"
        if lora and row is not lora:
            trained += f" ({row['trainable_params'] / lora['trainable_params']:.3g} times {lora['variant']})"
        cells = [
            row["variant"],
            *(score.show(row[score.name], row[f"{score.name}_half_width"]) for score in scores),
            trained,
            f"{row['trainable_params'] / row['total_params']:.2%}",
            f"{row['train_runtime']:.{0 if row['train_runtime'] >= 10 else 1}f}",
            f"{row['peak_memory_bytes'] / size:.{1 if unit == 'GB' else 0}f}",
        ]
        lines.append(cells)
    counts = {row["variant"]: len(row["seeds"]) for row in rows}
    few = [f"{variant} {count}" for variant, count in counts.items() if count < max(counts.values())]
    single = max(counts.values()) == 1
    note = "One seed, so there is no interval" if single else f"Mean over {max(counts.values())} seeds"
    note += f" ({', '.join(few)})" if few else ""
    note += "" if single else f" ± half of its {CONFIDENCE:.0%} confidence interval (Student's t)"
    figures = table(header, lines, right=range(1, len(header)))
    return f"{figures}\n\n{note}; time of training and peak memory are means.\n"


def make_table(configs: Sequence[str], seeds: Sequence[int], output_dir: str | None, flags: Sequence[str]) -> None:
    """Runs every variant under every seed, and writes `table.md`, `table.json` and `table.png`.

    Args:
        configs: One recipe, which stands for its folder, or several.
        seeds: The seeds of every variant.
        output_dir: The folder of the runs and the table; `outputs/<folder>-table` if left out.
        flags: More of the recipe's flags, for every run.

    Raises:
        UserError: An argument is wrong, the working directory is not a checkout's root, or a run failed (raised after
            all runs).
    """
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds are different whole numbers from 0, not {' '.join(map(str, seeds))}")
    variants = find_variants(configs, flags)
    if output_dir is None:
        output_dir = f"outputs/{Path(configs[0]).absolute().parent.name}-table"
    program = find_program(configs[0], flags)
    program.find()
    scores = judging_of(program).scores
    with locked_folder(output_dir) as output:
        variants = _without_adapter(variants, output)
        runs, failures = _run_all(variants, seeds, output, flags, scores)
        if runs:
            measured = [score for score in scores if all(run[score.name] is not None for run in runs)]
            _write(variants, runs, failures, output, flags, measured)
    if failures:
        first = failures[0]
        raise UserError(
            f"{len(failures)} of {len(runs) + len(failures)} runs failed, the first of them {first['variant']} with "
            f"seed {first['seed']}: {first['reason']}; finished runs are kept, and the same command runs the rest"
        )


def _run_all(
    variants: Sequence[Variant], seeds: Sequence[int], output: Path, flags: Sequence[str], scores: Sequence[Score]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs all variants seed by seed; returns the figures of finished runs and the reasons of failed ones."""
    jobs = [(variant, seed) for seed in seeds for variant in variants]
    runs: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    clock: dict[str, list[float]] = {}
    for number, (variant, seed) in enumerate(jobs, start=1):
        folder = output / f"{variant.name}-seed{seed}"
        line = f"{number}/{len(jobs)}  {variant.name}  seed {seed}  "
        try:
            outcome = run_recipe(variant.config, [*flags, *variant.flags, f"--seed={seed}"], folder)
            names = [*FIGURES, *(score.name for score in scores)]
            figures = {name: read_figure(outcome.results, name) for name in names}
            if missing := [name for name in (*FIGURES, scores[0].name) if figures[name] is None]:
                raise UserError(f"{folder}/all_results.json has no {', '.join(missing)}; give the recipe test rows")
        except UserError as error:
            failures.append({"variant": variant.name, "seed": seed, "reason": str(error)})
            print(f"{line}failed: {error}", flush=True)
            if not runs and len(failures) == len(variants):  # every variant failed
                break
            continue
        runs.append({"variant": variant.name, "seed": seed, "output_dir": str(folder)} | figures)
        first = scores[0]
        line += f"{first.title} {first.show(figures[first.name])}{'%' if first.is_share else ''}  "
        line += f"{duration(figures['train_runtime'])} of training"
        if outcome.seconds is None:
            line += "  (finished before)"
        else:
            clock.setdefault(variant.name, []).append(outcome.seconds)
        if clock and number < len(jobs):
            line += f"  about {duration(_time_left(clock, [variant.name for variant, _ in jobs[number:]]))} left"
        print(line, flush=True)
    return runs, failures


def _time_left(clock: dict[str, list[float]], names: Sequence[str]) -> float:
    """The time for these variants, by the mean of each one's runs so far, or of all runs if it has none."""
    every = [seconds for times in clock.values() for seconds in times]
    return sum(statistics.fmean(clock.get(name, every)) for name in names)


def _write(
    variants: Sequence[Variant],
    runs: Sequence[dict[str, Any]],
    failures: Sequence[dict[str, Any]],
    output: Path,
    flags: Sequence[str],
    scores: Sequence[Score],
) -> None:
    by_variant = {variant.name: [run for run in runs if run["variant"] == variant.name] for variant in variants}
    rows = [summarise(name, own, scores) for name, own in by_variant.items() if own]
    flags = without_secrets(flags)
    commands = {variant.name: {"config": variant.config, "flags": [*flags, *variant.flags]} for variant in variants}
    versions = package_versions() | {"python": platform.python_version()}
    write_json(
        output / "table.json",
        {"variants": rows, "runs": runs, "failures": failures, "commands": commands, "versions": versions}
        | {"confidence": CONFIDENCE},
    )
    text = markdown(rows, scores)
    for failure in failures:
        text += f"\nFailed: {failure['variant']} with seed {failure['seed']}: {failure['reason']}\n"
    settings = f"Flags of every run: `{' '.join(flags)}`\n\n" if flags else ""
    signature = ", ".join(f"{name} {version}" for name, version in versions.items())
    (output / "table.md").write_text(f"{text}\n{settings}{signature}\n", encoding="utf-8")
    first = scores[0]
    plot_against_size(rows, first.name, first.heading, output / "table.png", 100 if first.is_share else 1)
    print(f"\n{text}\ntable.md, table.json, table.png: {output}")
