"""What a refusal must look like: one line on standard error, and nothing written."""

import re
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., str]

PROGRESS = re.compile(r"\d+%\||\d+(it|examples|s)/(s|it|example)\b|\?(it| examples)/s")


def without_progress(stderr: str) -> list[str]:
    """The lines a person is left with once the progress bars have gone."""
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not PROGRESS.search(line)]


def the_one_line(code: object, stdout: str, stderr: str) -> str:
    """The error, after checking that it is all there is."""
    lines = without_progress(stderr)
    assert code == 2, stderr
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert re.fullmatch(r"((train|test) rows: .*\n|(warning|doctor|number formats): .*\n)*", stdout), stdout
    return lines[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
