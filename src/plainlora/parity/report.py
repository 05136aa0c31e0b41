"""Reports a comparison: a table for the terminal, `parity.json`, `parity.md`, `parity.png`."""

import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plainlora.markdown import table
from plainlora.parity.compare import CaseResult, Verdict
from plainlora.parity.observe import LEVELS
from plainlora.parity.tolerances import TOLERANCES
from plainlora.plots import COLOURS
from plainlora.report import package_versions, write_json

HEADER = ("case", "level", "max abs", "max rel", "allowed", "bits", "verdict")
WIDTHS = (34, 11, 9, 9, 9, 10, 8)
COLUMNS = 5  # panels in a row of the plot


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _cells(verdict: Verdict) -> tuple[str, ...]:
    bits = "identical" if verdict.identical else "" if verdict.status == "not run" else "differ"
    numbers = (_number(verdict.max_abs), _number(verdict.max_rel), _number(verdict.tolerance))
    return (verdict.case, verdict.level, *numbers, bits, verdict.status)


def terminal_rows(verdicts: Iterable[Verdict]) -> list[str]:
    """A line for each verdict, with the reason of a failure or of a level that did not run."""
    lines = []
    for verdict in verdicts:
        line = "  ".join(cell.ljust(width) for cell, width in zip(_cells(verdict), WIDTHS, strict=True))
        lines.append(line.rstrip() + (f"  {verdict.reason}" if verdict.status != "pass" else ""))
    return lines


def terminal_header(lora_backend: str) -> str:
    """The two lines above the table: what is compared, and the columns."""
    columns = "  ".join(title.ljust(width) for title, width in zip(HEADER, WIDTHS, strict=True)).rstrip()
    return f"{_what(lora_backend)}\n{columns}"


def _what(lora_backend: str) -> str:
    return f"the {lora_backend} form of PlainLoRA beside PEFT"


def _matrix_cell(verdict: Verdict) -> str:
    if verdict.status == "pass":
        return "=" if verdict.identical else _number(verdict.max_rel)
    return "**FAIL**" if verdict.status == "fail" else "·"


def markdown(results: Sequence[CaseResult]) -> str:
    """A matrix of cases and levels, an explanation of its signs, all verdicts, and the versions."""
    lines = [f"{line[0].upper()}{line[1:]}." for line in map(_what, _forms(results))]
    matrix = [[result.case.name, *map(_matrix_cell, result.verdicts)] for result in results]
    lines += ["", table(["case", *LEVELS], matrix)]
    notes = sorted({f"{verdict.level}: {verdict.reason}" for verdict in _flat(results) if verdict.status == "not run"})
    failures = [f"{v.case}, {v.level}: {v.reason}" for v in _flat(results) if v.status == "fail"]
    lines += [
        "",
        "`=` every bit identical; a number: the largest relative difference, within its tolerance; `·` not run.",
    ]
    lines += ["", *(f"- not run: {note}" for note in notes), *(f"- **FAIL** {failure}" for failure in failures)]
    lines += [f"- allowed {note}" for note in _allowed(results)]
    lines += [f"- {name}: the fused form covers {covered} layers" for name, covered in _not_all_fused(results)]
    lines += ["", table(HEADER, map(_cells, _flat(results)))]
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    lines += ["", f"Python {platform.python_version()}, {versions}; {_devices(results)}.", ""]
    return "\n".join(lines)


def _flat(results: Sequence[CaseResult]) -> list[Verdict]:
    return [verdict for result in results for verdict in result.verdicts]


def _allowed(results: Sequence[CaseResult]) -> list[str]:
    """Every reason for a tolerance, with the largest one and the levels."""
    held = [verdict for verdict in _flat(results) if verdict.status == "pass" and verdict.tolerance]
    lines = []
    for reason in sorted({verdict.reason for verdict in held}):
        most = max(verdict.tolerance or 0.0 for verdict in held if verdict.reason == reason)
        levels = [level for level in LEVELS if any((v.level, v.reason) == (level, reason) for v in held)]
        lines.append(f"{most:.1e} ({', '.join(levels)}): {reason}")
    return lines


def _forms(results: Sequence[CaseResult]) -> list[str]:
    return sorted({result.case.lora_backend for result in results})


def _not_all_fused(results: Sequence[CaseResult]) -> list[tuple[str, str]]:
    found = [(result.case.name, result.environment.get("fused layers", "0 of 0")) for result in results]
    return [(name, covered) for name, covered in found if len(set(covered.split(" of "))) > 1]


def _devices(results: Sequence[CaseResult]) -> str:
    return ", ".join(sorted({result.environment.get("device", "") for result in results} - {""})) or "nothing ran"


def plot(results: Sequence[CaseResult], path: Path) -> None:
    """Plots a panel for each case: both losses divided by the first, and the largest difference between the curves."""
    drawn = [result for result in results if len(result.losses) == 2]
    columns = min(COLUMNS, max(len(drawn), 1))
    rows = max(math.ceil(len(drawn) / columns), 1)
    figure = Figure(figsize=(max(2.2 * columns, 4), 1.7 * rows + 0.8), layout="constrained")
    panels = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for result, axes in zip(drawn, panels, strict=False):
        ours, theirs = result.losses.values()
        first = ours[0] or 1.0
        axes.plot([loss / first for loss in theirs], color=COLOURS["peft"], linewidth=4)
        axes.plot([loss / first for loss in ours], color=COLOURS["fused"], linewidth=1.2)
        gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=False))
        axes.set_title(result.case.name, fontsize=8)
        axes.annotate(f"{gap:.1e}" if gap else "equal", (0.97, 0.9), xycoords="axes fraction", ha="right", fontsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:  # unused ones
        axes.set_visible(False)
    form = ", ".join(_forms(results))
    figure.suptitle(
        f"Loss over the first loss: PlainLoRA, {form} form (thin), on PEFT (wide);\n"
        "in the corner the largest difference between the two losses of a step",
        fontsize=9,
    )
    figure.supxlabel("optimizer steps taken", fontsize=8)
    figure.savefig(path, dpi=150)


def _jsonable(value: object) -> object:
    """Replaces infinity, which JSON lacks."""
    return "infinite" if value == math.inf else value


def write(results: Sequence[CaseResult], directory: Path) -> None:
    """Writes `parity.json`, `parity.md` and `parity.png`."""
    write_json(
        directory / "parity.json",
        {
            "cases": [
                {
                    "name": result.case.name,
                    "seed": result.case.seed,
                    "lora_backend": result.case.lora_backend,
                    "environment": result.environment,
                    "losses": result.losses,
                    "levels": [
                        {name: _jsonable(value) for name, value in vars(verdict).items() if name != "case"}
                        for verdict in result.verdicts
                    ],
                }
                for result in results
            ],
            "tolerances": {name: {"relative": row.relative, "reason": row.reason} for name, row in TOLERANCES.items()},
            "versions": package_versions() | {"python": platform.python_version()},
        },
    )
    (directory / "parity.md").write_text(markdown(results), encoding="utf-8")
    plot(results, directory / "parity.png")
