"""A diagnosis as text, and as JSON with stable keys."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from plainlora.doctor.diagnosis import Diagnosis
from plainlora.doctor.finding import Finding, Level
from plainlora.doctor.sample import CLOSING, OPENING, PLAIN, show_sample
from plainlora.resources.engines import DevicesNeed
from plainlora.resources.footprint import format_size

COLOURS: dict[Level, str] = {"ok": "\033[32m", "note": "\033[36m", "warning": "\033[33m", "error": "\033[1;31m"}


def to_text(diagnosis: Diagnosis, colour: bool) -> str:
    """The diagnosis as text. The findings are last, where a terminal's reader looks first.

    Args:
        diagnosis: The diagnosis of a recipe.
        colour: Whether to use the terminal's colours.
    """
    found = diagnosis
    lines = [f"{found.config}, for recipes/{found.program}"]
    if found.settings:
        lines += ["", "settings, and where each value comes from", *_settings(found)]
    if found.precisions:
        lines += ["", "number formats", *(f"  {name:<16} {value}" for name, value in found.precisions.items())]
    if found.footprint is not None:
        lines += ["", "memory, disk and time, counted from the config"]
        lines += [f"  {line}" for line in found.footprint.lines()]
    if found.sample:
        lines += ["", _sample_title(found, colour), *_indented(show_sample(found.sample, colour))]
    if found.reports:
        lines += ["", *(report.line(f"{split} rows") for split, report in found.reports.items())]
    findings = found.examination.findings
    for subject in dict.fromkeys(finding.subject for finding in findings):
        lines += ["", subject]
        lines += [_line(finding, found.config, colour) for finding in findings if finding.subject == subject]
    if found.footprint is not None and found.footprint.devices is not None:
        lines += ["", *_devices(found.footprint.devices)]
    return "\n".join([*lines, "", found.examination.summary()])


def _settings(found: Diagnosis) -> list[str]:
    values = [_value(setting.value) for setting in found.settings]
    width = max(len(setting.name) for setting in found.settings)
    wide = min(44, max(map(len, values)))
    file = Path(found.config).name
    return [
        f"  {setting.name:<{width}}  {value:<{wide}}  {file if setting.origin == found.config else setting.origin}"
        for setting, value in zip(found.settings, values, strict=True)
    ]


def _devices(need: DevicesNeed) -> list[str]:
    """A table of what each engine needs on a device."""
    names = ("weights", "gathered", "adapters", "gradients", "buckets", "optimizer", "activations", "margin", "total")
    rows = [["engine", *names, "sent a step", ""]]
    for engine in need.engines:
        sizes = [*(getattr(engine, name) for name in names), engine.sent]
        verdict = {True: "fits", False: "DOES NOT FIT", None: "unknown"}[engine.fits]
        rows.append([engine.engine, *(format_size(size) if size != 0 else "-" for size in sizes), verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    how = "with" if need.checkpointing else "without"
    return [
        f"{need.devices} x {need.memory / 1e9:g} GB, one process on each: {how} gradient checkpointing, "
        f"{need.tokens_per_step:,} tokens a step",
        *("  " + "  ".join(map(str.rjust, row, widths)).rstrip() for row in rows),
        f"  choose: {need.choice or 'none fits'}; a device receives as many bytes as it sends",
    ]


def _sample_title(found: Diagnosis, colour: bool) -> str:
    if found.sample_label is not None:
        return f"the first training row, of the class {found.sample_label!r}"
    return "the first training row; its trained part is " + ("green" if colour else f"between {OPENING} and {CLOSING}")


def _line(finding: Finding, config: str, colour: bool) -> str:
    """A finding in one line, without the recipe's name."""
    level = f"{finding.level:<7}"
    level = COLOURS[finding.level] + level + PLAIN if colour else level
    return f"  {level}  {finding.check}: {finding.message.removeprefix(config + ': ')}"


def _value(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(getattr(value, "value", value))
    return {"None": "-", "": "-"}.get(text, text)


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def to_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """The whole diagnosis as JSON."""
    found = diagnosis
    counts = found.examination.counts()
    return {
        "config": found.config,
        "program": found.program,
        "passed": not counts["error"],
        "counts": counts,
        "findings": [asdict(finding) for finding in found.examination.findings],
        "rows": {split: asdict(report) for split, report in found.reports.items()},
        "settings": {
            setting.name: {"value": _plain(setting.value), "origin": setting.origin} for setting in found.settings
        },
        "precisions": found.precisions,
        "footprint": None if found.footprint is None else found.footprint.to_dict(),
        "sample": {"segments": [asdict(segment) for segment in found.sample], "label": found.sample_label},
    }


def _plain(value: Any) -> Any:
    """The value of an enumeration's member; anything else unchanged."""
    return getattr(value, "value", value)
