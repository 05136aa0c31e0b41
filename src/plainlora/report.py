"""Writes a run's results as JSON, and sample answers as Markdown."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from plainlora.folders import write_durably

Sample = tuple[str, str, str]  # a prompt, the base's answer, the adapter model's

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "scikit-learn")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Writes sorted, indented JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


def package_versions() -> dict[str, str]:
    """The versions of the packages that a result depends on; an optional one that is not installed is left out."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe_samples(samples: Sequence[Sample], trained: str = "adapter") -> str:
    """Prompts with both answers side by side, unchanged, as Markdown.

    Args:
        samples: Prompts with the answers before and after training.
        trained: What was trained.
    """
    return "\n".join(
        f"""{_fenced(prompt)}

<table>
<tr><th>base</th><th>{trained}</th>
</tr>
<tr><td>

{_fenced(before)}

</td>
<td>

{_fenced(after)}

</td>
</tr>
</table>
"""
        for prompt, before, after in samples
    )


def describe_steps(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> str:
    """Each prompt with its answers by step, unchanged, as Markdown.

    Args:
        prompts: The prompts.
        answers: `base`, or the number of an optimizer step, to an answer for each prompt.
    """
    parts = []
    for number, prompt in enumerate(prompts):
        parts.append(f"{_fenced(prompt)}\n")
        for name, texts in answers.items():
            parts.append(f"{f'step {name}' if name.isdecimal() else name}\n\n{_fenced(texts[number])}\n")
    return "\n".join(["## By step\n", *parts])


def write_samples(
    path: Path, samples: Sequence[Sample], trained: str = "adapter", steps: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Writes sample answers before and after training, and by step if given, as Markdown. Without samples no file."""
    if samples:
        by_step = [describe_steps([prompt for prompt, _, _ in samples], steps)] if steps else []
        write_durably(path, "\n".join([describe_samples(samples, trained), *by_step]))


def _fenced(text: str) -> str:
    """A text between fences that are longer than any fence in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
