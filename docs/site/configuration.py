"""Writes docs/configuration.md, the page of all settings, from the dataclasses. A test holds the page to them.

python docs/site/configuration.py
"""

import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from plainlora.settings.parsing import READ_BY_NOTHING
from plainlora.settings.programs import CLASSIFY, SFT, Program

PAGE = Path(__file__).parents[1] / "configuration.md"
BEGINNING = """# All settings

Every name is a key of a recipe's YAML and a flag of its program: `learning_rate: 2e-4`, `--learning_rate 2e-4`. The
command line wins. What a program cannot honour it refuses by name, and `plainlora doctor` says where each value came
from. This page is written from the dataclasses of the versions in `requirements.txt`.
"""


def _type(annotation: Any) -> str:
    """`int | None` for `Optional[int]`, `a | b` for a choice."""
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_type, get_args(annotation))))
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if annotation is type(None):
        return "None"
    if get_origin(annotation) is not None:
        return f"{get_origin(annotation).__name__}[{', '.join(map(_type, get_args(annotation)))}]"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return str(field.default)
    return str(field.default_factory()) if field.default_factory is not MISSING else "needed"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(kind: type[Any], skipped: set[str]) -> Iterator[str]:
    yield "| setting | type | default | |"
    yield "|---|---|---|---|"
    for field in fields(kind):
        if field.name not in skipped and field.init and field.name not in READ_BY_NOTHING:
            said = _cell(str(field.metadata.get("help", "")))
            yield f"| `{field.name}` | {_cell(_type(field.type))} | {_cell(_default(field))} | {said} |"


def _is_own(kind: type[Any]) -> bool:
    return kind.__module__.startswith("plainlora")


def _program(program: Program[Any]) -> Iterator[str]:
    """A table of what this project adds, then one of what TRL or Transformers declares."""
    for kind in program.dataclass_types:
        declared = next((base for base in kind.__mro__ if base is not object and not _is_own(base)), object)
        upstream = set() if declared is object else {field.name for field in fields(declared)}
        everything = {field.name for field in fields(kind)}
        if _is_own(kind):
            yield f"\n### {kind.__name__}\n\n{(kind.__doc__ or '').strip().splitlines()[0]}\n"
            yield from _table(kind, upstream)
        if upstream:
            library = declared.__module__.partition(".")[0]
            yield f"\n### {declared.__name__}\n\nOf `{library}`, with the defaults of this program.\n"
            yield from _table(kind, everything - upstream)


def page() -> str:
    """The page, in Markdown."""
    lines = [BEGINNING]
    for program in (SFT, CLASSIFY):
        lines += [f"\n## recipes/{program.name}", *_program(program)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
