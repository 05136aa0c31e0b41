"""Writes the results of all architectures: `architectures.json`, and `architectures.md` with counts."""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from plainlora.markdown import table
from plainlora.parity.architectures import COMPARED, LEVELS, Architecture, Outcome, Row, Task
from plainlora.report import package_versions, write_json

OUTCOMES = {
    "=": "every bit the same",
    "close": "within 1e-6",
    "refused": "refused by name",
    "differs": "neither",
}
TITLES: dict[Task, str] = {"causal": "Causal language models", "classifier": "Sequence classifiers"}
INTRODUCTION = """\
# Architectures

{built} of the {all} causal language models and sequence classifiers of Transformers were compared with PEFT, and
{differ} differ: at each level the others are equal to 1e-6, or refused by name.

Each was compared tiny and with random weights, by `plainlora compare --architectures`, which writes this page.

| level | what is compared |
|---|---|
| `init`, `forward`, `gradients`, `files`, `merge` | the fused form with PEFT |
| `loss` | the loss of a training step with the loss of the model's own forward |
| `packing` | the loss of packed documents with the losses of each alone |

A number is the largest relative difference, `=` that every bit is the same. It is measured in fp64 if the rounding of
fp32 exceeds 1e-6. A refusal is the message that a user would get: [what is refused](#what-is-refused), [what was not
compared](#what-was-not-compared)."""


def _name(architecture: Architecture) -> str:
    return f"{architecture.class_name} ({architecture.model_type})"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.kind == "close":
        return f"{outcome.relative:.0e}"
    return "**differs**" if outcome.kind == "differs" else outcome.kind


def terminal_line(row: Row) -> str:
    """One architecture in one line."""
    ends = [f"{level} {_cell(outcome)}" for level, outcome in row.outcomes.items()]
    return f"{_name(row.architecture):58}  " + (f"not compared: {row.not_built}" if row.not_built else "  ".join(ends))


def count(rows: Sequence[Row]) -> dict[str, Counter[str]]:
    """The number of each outcome, by level."""
    ends = {level: [row.outcomes[level].kind for row in rows if level in row.outcomes] for level in LEVELS}
    return {level: Counter(outcomes) for level, outcomes in ends.items()}


def list_reasons(rows: Sequence[Row], kind: str) -> list[str]:
    """The reasons of one outcome: a line for each, with its levels."""
    found = []
    for row in rows:
        levels: dict[str, list[str]] = {row.refused: ["all-linear"]} if row.refused and kind == "refused" else {}
        for level, outcome in row.outcomes.items():
            if outcome.kind == kind:
                levels.setdefault(outcome.reason, []).append(level)
        found += [f"{_name(row.architecture)}, {', '.join(names)}: {reason}" for reason, names in levels.items()]
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The counts, a table for each task, all refusals, and the architectures that were not built.

    Args:
        rows: One row for each architecture.
    """
    built, counts = [row for row in rows if not row.not_built], count(rows)
    differ = sum(any(outcome.kind == "differs" for outcome in row.outcomes.values()) for row in built)
    lines = [INTRODUCTION.format(built=len(built), all=len(rows), differ=differ), ""]
    sums = [[level, *(counts[level][kind] for kind in OUTCOMES)] for level in LEVELS]
    lines.append(table(["level", *OUTCOMES.values()], sums, right=range(1, 1 + len(OUTCOMES))))
    for task, title in TITLES.items():
        levels = LEVELS if task == "causal" else COMPARED
        cells = [
            [row.architecture.model_type, row.architecture.class_name, row.targets]
            + [_cell(row.outcomes.get(level)) for level in levels]
            for row in built
            if row.architecture.task == task
        ]
        lines += ["", f"## {title}", "", table(["model type", "class", "LoRA on", *levels], cells)]
    not_built = [f"{_name(row.architecture)}: {row.not_built}" for row in rows if row.not_built]
    sections = {
        "What is refused": list_reasons(built, "refused"),
        "What differs": list_reasons(built, "differs"),
        "What was not compared": not_built,
    }
    for title, entries in sections.items():
        lines += ["", f"## {title}", "", *(f"- {entry}" for entry in entries or ["Nothing."])]
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return "\n".join([*lines, "", f"Python {platform.python_version()}, {versions}.", ""])


def write(rows: Sequence[Row], directory: Path) -> None:
    """Writes `architectures.json` and `architectures.md`."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"architectures": [asdict(row) for row in rows], "counts": count(rows), "versions": package_versions()}
    write_json(directory / "architectures.json", content)
    (directory / "architectures.md").write_text(markdown(rows), encoding="utf-8")
