"""Reads JSON files that should hold a mapping and may be damaged."""

import json
from pathlib import Path
from typing import Any


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Args:
        path: An existing file.

    Raises:
        ValueError: It is not JSON, nested too deeply, not UTF-8, cannot be opened, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not isinstance(content, dict):
        raise ValueError("it is not a mapping")
    return content
