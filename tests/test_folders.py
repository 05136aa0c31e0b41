"""What is written appears whole or not at all, and damage is found."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plainlora.errors import UserError
from plainlora.folders import (
    MANIFEST,
    check_disk,
    find_damage,
    move_in,
    put_in_place,
    sha256_of,
    staged,
    write_durably,
    write_manifest,
)


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too, but for manifests."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write files beyond a size, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_hash_is_that_of_the_whole_content(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "million").write_bytes(b"a" * 1_000_000)  # both from FIPS 180-4's examples; this one is many blocks
    assert sha256_of(tmp_path / "million") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    (tmp_path / "large").write_bytes(bytes(3 << 20))
    before = sha256_of(tmp_path / "large")
    with (tmp_path / "large").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")
    assert sha256_of(tmp_path / "large") != before


def test_a_file_is_replaced_whole_and_readable_by_others(tmp_path: Path) -> None:
    write_durably(tmp_path / "text", "größer")
    assert (tmp_path / "text").read_text(encoding="utf-8") == "größer"
    with (tmp_path / "text").open("rb") as reader:  # at work while the file is written again
        write_durably(str(tmp_path / "text"), b"bytes")
        assert reader.read() == "größer".encode()
    assert content(tmp_path) == {"text": b"bytes"}
    (tmp_path / "plain").touch()
    assert (tmp_path / "text").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_u10_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    write_durably(tmp_path / "text", "old")
    with largest_file(1000), pytest.raises(OSError, match="too large"):
        write_durably(tmp_path / "text", "new" * 1000)
    assert content(tmp_path) == {"text": b"old"}


def write_two(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(range(200)))
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("text")


def test_the_manifest_names_every_file_and_says_of_none_that_it_is_damaged(tmp_path: Path) -> None:
    write_two(tmp_path)
    assert find_damage(tmp_path) is None  # nothing to be compared with
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None
    files = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert {name: each["bytes"] for name, each in files.items()} == {"weights": 200, "runs/log": 4}
    (tmp_path / "notes").write_text("mine")
    assert find_damage(tmp_path) is None
    write_manifest(tmp_path)
    assert set(json.loads((tmp_path / MANIFEST).read_text())["files"]) == {"weights", "runs/log", "notes"}


def flip_a_bit(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 4
    path.write_bytes(changed)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("weights", Path.unlink, "weights is missing"),
    "cut": ("weights", lambda path: path.write_bytes(path.read_bytes()[:-1]), "weights has 199 bytes instead of 200"),
    "emptied": ("runs/log", lambda path: path.write_bytes(b""), "runs/log has 0 bytes instead of 4"),
    "longer": ("runs/log", lambda path: path.write_text("texts"), "runs/log has 5 bytes instead of 4"),
    "flipped": ("weights", flip_a_bit, "the content of weights has changed since it was written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_u10_every_damage_is_named(tmp_path: Path, damage: str) -> None:
    write_two(tmp_path)
    write_manifest(tmp_path)
    name, act, expected = DAMAGES[damage]
    act(tmp_path / name)
    assert find_damage(tmp_path) == expected


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"files": null}', '{"files": ["weights"]}', '{"files": {"weights": 200}}', '{"a": {}}',
     '{"files": {"weights": {"bytes": 200}}}', '{"files": {"weights": {"sha256": ""}}}', "\xff"],
)  # fmt: skip
def test_u10_a_manifest_that_cannot_be_read_is_damage(tmp_path: Path, text: str) -> None:
    write_two(tmp_path)
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    assert find_damage(tmp_path) == "manifest.json is unreadable"


def test_a_bit_that_flips_anywhere_in_a_manifest_is_noticed(tmp_path: Path) -> None:
    """One in each byte is tried. A space that becomes another space is left unnoticed, and is no damage."""
    (tmp_path / "weights").write_bytes(bytes(200))
    write_manifest(tmp_path)
    whole = (tmp_path / MANIFEST).read_bytes()
    unnoticed = set()
    for at, byte in enumerate(whole):
        (tmp_path / MANIFEST).write_bytes(whole[:at] + bytes([byte ^ (1 << at % 8)]) + whole[at + 1 :])
        if find_damage(tmp_path) is None:
            unnoticed.add(byte)
    assert unnoticed <= set(b" \n")


def test_a_staged_folder_takes_its_place_with_a_manifest(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "merged"
    with staged(target) as scratch:
        write_two(scratch)
        assert not target.exists()
        assert scratch.parent == target.parent  # on the same disk, where a rename is atomic
    assert content(target) == {"weights": bytes(range(200)), "runs/log": b"text"}
    assert (target / MANIFEST).is_file()
    assert find_damage(target) is None
    assert [path.name for path in target.parent.iterdir()] == ["merged"]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_private_file_is_as_readable_as_those_beside_it(tmp_path: Path) -> None:
    with staged(tmp_path / "model") as scratch:
        save_file({"a": torch.zeros(1)}, scratch / "model.safetensors")
        (scratch / "config.json").write_text("{}")
        assert (scratch / "model.safetensors").stat().st_mode & 0o777 == 0o600  # as safetensors makes it
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o666 & ~mask}


def test_u10_a_staged_folder_replaces_another_only_once_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    (target / "old").write_text("old")

    def fail() -> None:
        with staged(target) as scratch:
            (scratch / "new").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert content(tmp_path) == {"merged/old": b"old"}
    with staged(target) as scratch:
        (scratch / "new").write_text("new")
        assert content(target) == {"old": b"old"}
    assert content(tmp_path) == {"merged/new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


HALF_WRITTEN = """
import sys, time
from pathlib import Path
from plainlora.folders import staged

with staged(sys.argv[1]) as scratch:
    (scratch / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_u10_what_a_kill_left_is_removed_and_what_another_process_is_writing_is_not(tmp_path: Path) -> None:
    target = tmp_path / "merged [1]"  # a pattern, were it not escaped
    theirs = [f".{target.name}.backup_1", f".{target.name}2.saving.abcdefgh"]
    for name in theirs:
        (tmp_path / name).mkdir()
    writer = subprocess.Popen([sys.executable, "-c", HALF_WRITTEN, target], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        (half,) = {path.name for path in tmp_path.iterdir()} - {*theirs}
        with staged(target) as scratch:
            (scratch / "whole").write_text("1")
        assert {path.name for path in tmp_path.iterdir()} == {*theirs, target.name, half}
        assert content(tmp_path / half) == {"half": b"half"}
    finally:
        writer.kill()
        writer.communicate()
    with staged(target) as scratch:
        (scratch / "whole").write_text("2")
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, target.name}
    assert content(target) == {"whole": b"2"}


def test_u10_a_disk_that_is_full_while_a_folder_is_staged_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    (target / "old").write_text("old")

    def fill() -> None:
        with staged(target) as scratch:
            (scratch / "new").write_bytes(bytes(2000))

    with largest_file(1000), pytest.raises(OSError, match="too large"):
        fill()
    assert content(tmp_path) == {"merged/old": b"old"}


def test_u10_a_folder_that_cannot_be_set_aside_is_left_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point is one; the working folder, by the name of `.`, is one everywhere."""
    (tmp_path / "old").write_text("old")
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(UserError, match=r"^\. cannot be replaced \(.*busy.*\); give another folder$"),
        staged(".") as scratch,
    ):
        (scratch / "new").write_text("new")
    assert content(tmp_path) == {"old": b"old"}


def test_u10_a_folder_that_nothing_can_take_the_place_of_comes_back(tmp_path: Path) -> None:
    """Here, because what is to take its place lies in it and goes aside with it."""
    target = tmp_path / "merged"
    (target / "scratch").mkdir(parents=True)
    (target / "old").write_text("old")
    with pytest.raises(UserError, match="merged cannot be replaced"):
        put_in_place(target / "scratch", target)
    assert content(tmp_path) == {"merged/old": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_u10_what_is_moved_in_keeps_its_neighbours_and_the_manifest_comes_last(tmp_path: Path) -> None:
    run = tmp_path / "run"
    scratch = run / ".saving"
    scratch.mkdir(parents=True)
    for name in ("run.json", "weights"):
        (run / name).write_text("old")
    write_two(scratch)
    move_in(scratch, run)
    assert content(run) == {"run.json": b"old", "weights": bytes(range(200)), "runs/log": b"text"}
    assert not scratch.exists()
    assert find_damage(run) is None
    assert "run.json" not in json.loads((run / MANIFEST).read_text())["files"]


def test_u10_a_move_that_breaks_off_leaves_no_manifest_that_promises_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / ".saving").mkdir(parents=True)
    (run / "weights").mkdir()  # which no file can replace
    write_two(run / ".saving")
    with pytest.raises(IsADirectoryError):
        move_in(run / ".saving", run)
    assert not (run / MANIFEST).exists()


def test_u10_too_little_disk_is_an_error_before_writing(tmp_path: Path) -> None:
    check_disk(tmp_path, 1, "a checkpoint")
    check_disk(tmp_path / "not" / "yet" / "made", 1, "a checkpoint")
    with pytest.raises(
        UserError, match=r"a checkpoint needs 1,000,000,000.00 GB, but the disk of .* has [\d.]+ GB free;"
    ):
        check_disk(tmp_path / "not" / "yet", 10**18, "a checkpoint")
    assert list(tmp_path.iterdir()) == []
