"""Writes files and folders atomically, with a manifest by which damage is found later.

Everything is written to a temporary place on the same disk, flushed, and renamed, which is atomic (POSIX). After a
power cut or a kill there is either the old content or the new; a kill between the two renames that replace a folder
leaves the old one beside its place, in a folder with a dot and its name in front.
"""

import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plainlora.errors import UserError
from plainlora.json_files import read_mapping

MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes that are read at a time


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk. Windows opens no folder."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_durably(path: str | Path, content: str | bytes) -> None:
    """Writes a file atomically: a reader sees the old content or the new.

    Raises:
        OSError: The disk is full or cannot be written to. The old content is then unchanged.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_manifest(folder: str | Path) -> None:
    """Writes `manifest.json`, the size and SHA-256 of every file in a folder, after all of them are on the disk."""
    folder = Path(folder)
    files = {}
    for path in _files_in(folder):
        if path.name != MANIFEST:
            path.chmod(0o666 & ~_umask())  # safetensors makes its own private
            _flush(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_durably(folder / MANIFEST, json.dumps({"files": files}, indent=2, sort_keys=True) + "\n")


def find_damage(folder: str | Path) -> str | None:
    """What is wrong with the files that a folder's manifest names, in one clause; `None` if nothing is.

    A folder without a manifest and files that the manifest does not name are not checked.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return None
    try:
        files: dict[str, Any] = read_mapping(folder / MANIFEST)["files"]
        for name, expected in sorted(files.items()):
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if sha256_of(path) != expected["sha256"]:
                return f"the content of {name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    return None


def _lock(folder: Path) -> int | None:
    """A handle that locks a folder until it is closed or this process ends; `None` if a lock cannot be had.

    filelock locks files, and a file within the folder would be published with it.
    """
    if sys.platform == "win32":
        return None
    import fcntl  # noqa: PLC0415  # Windows has none

    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, the folder is gone, or the file system has no locks
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _remove_unfinished(target: Path) -> None:
    """Removes the scratch folders of `target` that were left by a kill: no process holds their lock any more."""
    for folder in target.parent.glob(f"{glob.escape(_unfinished(target))}*"):
        if (handle := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def _unfinished(target: Path) -> str:
    """How the names of `target`'s scratch folders begin; no others are ever removed."""
    return f".{target.name}.saving."


@contextmanager
def staged(target: str | Path) -> Iterator[Path]:
    """A scratch folder that replaces `target`, with a manifest, when the block ends without an error.

    The old folder is moved away first and removed last. If the block raises, the scratch folder is removed and
    `target` is unchanged; what a kill has left of one is removed by the next call, except on Windows.

    Args:
        target: The folder to write. Its parents are created.

    Raises:
        UserError: `target` cannot be replaced, for example because it is a mount point.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(target)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    scratch, handle = made.with_name(_unfinished(target) + made.suffix[1:]), None
    try:
        handle = _lock(made)  # before it gets the name by which another process would remove it
        made.rename(scratch)
        scratch.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield scratch
        put_in_place(scratch, target)
    finally:
        for folder in (made, scratch):
            shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def put_in_place(scratch: Path, target: Path) -> None:
    """Gives a finished folder its manifest and its name; see `staged`.

    Raises:
        UserError: `target` cannot be replaced.
    """
    write_manifest(scratch)
    for folder in {path.parent for path in _files_in(scratch)}:
        _flush(folder)
    if not target.exists():
        scratch.rename(target)
        _flush(target.parent)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        target.rename(aside / target.name)
        try:
            scratch.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise
    except OSError as error:
        aside.rmdir()
        raise UserError(f"{target} cannot be replaced ({error}); give another folder") from error
    _flush(target.parent)
    shutil.rmtree(aside)


def move_in(scratch: Path, folder: Path) -> None:
    """Moves the files of `scratch` into a folder that holds other files too, one by one, the manifest last.

    After a kill in between the manifest does not fit the files, which `find_damage` reports.
    """
    write_manifest(scratch)
    for path in sorted(_files_in(scratch), key=lambda path: path.name == MANIFEST):
        target = folder / path.relative_to(scratch)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    shutil.rmtree(scratch)
    _flush(folder)


def free_on_disk(folder: str | Path) -> int:
    """Bytes free on the disk of a folder, which may not exist yet."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def check_disk(folder: str | Path, needed: int, what: str) -> None:
    """Raises `UserError` if the disk of a folder has fewer than `needed` bytes free for `what`."""
    free = free_on_disk(folder)
    if free < needed:
        needs, has = (f"{size / 1e9:,.2f} GB" if needed > 1e8 else f"{size / 1e6:,.2f} MB" for size in (needed, free))
        raise UserError(
            f"{what} needs {needs}, but the disk of {folder} has {has} free; make room, or give another folder"
        )
