"""A folder from elsewhere may not reach out of itself: by a link, or by a file name in an index."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def find_escape(folder: str | os.PathLike[str]) -> str | None:
    """What in a model's or an adapter's folder leads out of it, in one clause; `None` if nothing does.

    Looked at are links to files, and the files that an index of shards names (`weight_map` of `*.index.json`), which
    Transformers joins to the folder as they are (`get_checkpoint_shard_files`):
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/hub.py

    A snapshot in the Hub's cache is links to the blobs beside it; these are in their place.

    Args:
        folder: It need not exist.
    """
    folder = Path(os.path.expanduser(folder))
    if not os.path.isdir(folder):
        return None
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":  # .../models--USER--NAME/snapshots/COMMIT
        root = root.parent.parent

    def is_inside(path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(root)

    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.is_dir() and not is_inside(path):
            return f"{path.name} is a link to {os.readlink(path)}, outside of the folder"
        if path.name.endswith(".index.json"):
            for name in _named_outside(path, is_inside):
                return f"{path.name} names the file {name!r}, outside of the folder"
    return None


def _named_outside(index: Path, is_inside: Callable[[Path], bool]) -> Iterator[str]:
    """Files that an index names and that lie elsewhere; a damaged index names none, and whoever loads it says so."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    for name in sorted(name for name in names if isinstance(name, str)):
        if "\0" in name or not is_inside(index.parent / name):
            yield name
