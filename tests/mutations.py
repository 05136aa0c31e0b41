"""Damage to files, drawn from a seeded generator: what disks, editors, networks and strangers do to them."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Draw = random.Random
Damage = Callable[[bytes, Draw], bytes]

BOM = b"\xef\xbb\xbf"
BYTES = [b"\0", b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\r", b"\n", b'"', b"{", b"[", b"\\", b"\t", b"\xe2\x80\xa8", BOM]
DEEP = "[" * 5000 + "]" * 5000


def flip(content: bytes, draw: Draw) -> bytes:
    """A bit, or a few."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 20]) if content else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: Draw) -> bytes:
    return content[: draw.choice([0, 1, 7, 9, len(content) // 2, max(len(content) - 1, 0), draw.randint(0, 200)])]


def lose(content: bytes, draw: Draw) -> bytes:
    at = draw.randint(0, len(content))
    return content[:at] + content[at + draw.choice([1, 2, 8, 64]) :]


def repeat(content: bytes, draw: Draw) -> bytes:
    at = draw.randint(0, len(content))
    part = content[at : at + draw.choice([1, 10, 100, 10_000])]
    return content[:at] + part * draw.choice([2, 3, 50]) + content[at:]


def insert(content: bytes, draw: Draw) -> bytes:
    at = draw.randint(0, len(content))
    return content[:at] + draw.choice(BYTES) * draw.choice([1, 1, 2, 300]) + content[at:]


def mark(content: bytes, draw: Draw) -> bytes:
    return BOM + content


def reencode(content: bytes, draw: Draw) -> bytes:
    return content.decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-32", "latin-1", "utf-8"]), "replace")


def end_lines(content: bytes, draw: Draw) -> bytes:
    return content.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n", b" \n", b""]))


def append(content: bytes, draw: Draw) -> bytes:
    return content + draw.choice([*BYTES, b"x" * 100_000, b"{}", b"\n" * 50])


def forget(content: bytes, draw: Draw) -> bytes:
    return draw.choice([b"", b"\n", b" ", b"null", b"{}", b"[]", b"0", b'""'])


RAW: list[Damage] = [flip, cut, lose, repeat, insert, mark, reencode, end_lines, append, forget]


def junk(draw: Draw) -> Any:
    """A value that is of the wrong type, too large, empty, or written to do harm."""
    return draw.choice(
        [
            None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, -(10**30), 1.5, -0.0, 1e308, float("nan"),
            float("inf"), "", " ", "a", "0", "None", "true", "é" * 3, "\ud800", "\0", "x" * 5000, "../../x",
            "/etc/passwd", "~nobody/x", "a/b/c", "a/b", "https://x/y", "%s%n{0}", "(", "[a-", "(a+)+$", "*", ".*",
            "\n", "🦙", [], {}, [[]], [None], [1, "a"], ["q_proj", 3], {"a": 1}, {"": None}, {"a": {"b": {"c": [{}]}}},
            [[[[[[1]]]]]],
        ]
    )  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in list(keys)[:200]:
        found += [(*path, key), *_places(value[key], (*path, key))]
    return found


def change_value(value: Any, draw: Draw) -> Any:
    """One value inside a JSON value becomes junk, goes, comes twice, or moves."""
    value = json.loads(json.dumps(value))
    places = _places(value)
    if not places or draw.random() < 0.03:
        return junk(draw)
    *parents, key = draw.choice(places)
    inside = value
    for parent in parents:
        inside = inside[parent]
    match draw.choice(["junk", "junk", "junk", "drop", "add", "swap"]):
        case "junk":
            inside[key] = junk(draw)
        case "drop":
            del inside[key]
        case "add" if isinstance(inside, dict):
            inside[draw.choice(["more", "", "é", "__class__", "self", "\ud800", "x" * 300, *map(str, inside)])] = junk(
                draw
            )
        case "add":
            inside.insert(key, junk(draw))
        case "swap":
            other = draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            inside[key], inside[other] = inside[other], inside[key]
    return value


def in_json(content: bytes, draw: Draw) -> bytes:
    """One to three values of a JSON file are changed; sometimes a key is written twice or a list is too deep."""
    value = json.loads(content)
    for _ in range(draw.choice([1, 1, 2, 3])):
        value = change_value(value, draw)
    text = json.dumps(value)
    match draw.randrange(12):
        case 0:
            text = text.replace("{", '{"r": 1, "r": 2, ', 1)
        case 1:
            text = text.replace(": ", f": {DEEP}, " + '"z": ', 1)
        case 2:
            text = text.replace(": ", ": " + "9" * 5000 + ', "z": ', 1)
    return text.encode("utf-8", "surrogatepass")


def in_json_lines(content: bytes, draw: Draw) -> bytes:
    """One line of JSON lines is changed, goes, or comes twice."""
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    match draw.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[draw.randrange(len(lines))])
        case _:
            if lines[at].strip():
                lines[at] = in_json(lines[at], draw)
    return b"\n".join(lines)


def in_table(content: bytes, draw: Draw) -> bytes:
    """A field, a separator or the header of a csv or tsv is changed."""
    lines = content.decode("utf-8").split("\n")
    at = draw.randrange(len(lines))
    separator = "\t" if "\t" in lines[0] else ","
    fields = lines[at].split(separator)
    part = draw.randrange(len(fields))
    match draw.randrange(5):
        case 0:
            fields[part] = str(junk(draw))
        case 1:
            del fields[part]
        case 2:
            fields.insert(part, draw.choice(["", '"', '"a', "a\tb,c", "x" * 200_000]))
        case 3:
            lines[0] = draw.choice(["", separator, "text", "text,text", lines[0].upper(), lines[-1]])
        case 4:
            separator = draw.choice([",", ";", "\t", " ", '"', "\0"])
    lines[at] = separator.join(fields)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


YAML = [
    "!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!python/object:builtins.object {}",
    "!!binary eA==", "!!set {a, b}", "!!int x", "!!float 1", "&a [*a]", "*nowhere", "&a {b: *a}", "{", "[", "- a", "'",
    '"\\ud800"', '"\\0"', ".nan", ".inf", "-.inf", "1_000", "0x7f", "0o17", "1e5", "1e999", "2024-13-45",
    "2024-01-01", "12:30:45", "~", "yes", "off", "[1, [2, [3]]]", "{a: {b: 1}}", "{2024-01-01: 1}", "{? [a]: 1}",
    "|\n  text", ">", "? x", "%TAG", "@x", "`x`", "\tx", "#", "=", "<<", "'" + "x" * 5000 + "'",
    "[" * 300 + "]" * 300, "99999999999999999999999", "-1", "0", "1.5", "true", "none", "../x", "a b c", "'--lora_r'",
    "'a=b'", "é", "🦙",
]  # fmt: skip


def in_yaml(content: bytes, draw: Draw) -> bytes:
    """One to three lines of a recipe are changed."""
    lines = content.decode("utf-8").split("\n")
    for _ in range(draw.choice([1, 1, 2, 3])):
        at = draw.randrange(len(lines))
        key, separator, value = lines[at].partition(":")
        match draw.randrange(9):
            case 0:
                del lines[at]
                lines = lines or [""]
            case 1:
                lines.insert(at, lines[draw.randrange(len(lines))])
            case 2:
                lines[at] = flip(key.encode(), draw).decode("utf-8", "replace") + separator + value
            case 3:
                lines[at] = draw.choice([" ", "\t", "  - ", "env:\n  ", "? "]) + lines[at]
            case 4:
                lines.insert(
                    at, draw.choice(["---", "...", "<<: {lora_r: 2}", "%YAML 1.1", "env: {A: 1}", "env: 5", "- a"])
                )
            case _:
                lines[at] = f"{key}: {draw.choice(YAML)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _join(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


NUMBERS = [
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\x00\x00\x80\xff",
    b"\xff\xff\x7f\x7f",
    b"\x01\x00\x00\x00",
]  # fp32
TYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "U16", "NEW"]


def in_values(content: bytes, draw: Draw) -> bytes:
    """A value of a safetensors file becomes another, perhaps no number or an enormous one."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    at = start + 4 * draw.randrange((len(content) - start) // 4)
    return content[:at] + draw.choice(NUMBERS) + content[at + 4 :]


def in_tensors(content: bytes, draw: Draw) -> bytes:
    """The header of a safetensors file, or values in it, are changed."""
    header, data = _split(content)
    names = [name for name in header if name != "__metadata__"]
    name, other = draw.choice(names), draw.choice(names)
    size = None
    match draw.randrange(13):
        case 0:
            size = draw.choice([0, 1, 2**32, 2**63, 2**64 - 1, 100_000_001, len(content)])
        case 1:
            header[name], header[other] = header[other], header[name]
        case 2:
            header[name]["dtype"] = draw.choice(TYPES)
        case 3:
            header[name]["shape"] = draw.choice(
                [[], [0], [-1], header[name]["shape"][::-1], [2**40, 2**40], ["a"], [1] * 40]
            )
        case 4:
            start, end = header[name]["data_offsets"]
            header[name]["data_offsets"] = draw.choice(
                [[end, start], [start, end + 4], [0, 2**62], [start], [start, start]]
            )
        case 5:
            header[draw.choice(["more", "", "é", "../x", f"{name}.x", "__metadata__", "\ud800"])] = header.pop(name)
        case 6:
            del header[name]
        case 7:
            data = data[: -draw.choice([1, 4, 1000])]
        case 8 | 9:
            return in_values(content, draw)
        case 10:
            header["__metadata__"] = draw.choice(
                [{"format": "tf"}, {"format": 5}, {}, [], None, {"format": "pt", "x": "y" * 5000}]
            )
        case 11:
            header = change_value(header, draw)
        case 12:
            header[name]["shape"] = header[other]["shape"]
    return _join(json.dumps(header).encode("utf-8", "surrogatepass"), data, size)


def of_kind(path: Path) -> list[Damage]:
    """The kinds of damage that know a file's format; one of them is drawn twice as often as raw damage."""
    name = path.name.removesuffix(".gz")
    suffix = name.rpartition(".")[2]
    return {
        "json": [in_json], "jsonl": [in_json_lines], "csv": [in_table], "tsv": [in_table], "yaml": [in_yaml],
        "safetensors": [in_tensors],
    }.get(suffix, [])  # fmt: skip


def damage_file(path: Path, draw: Draw) -> str:
    """Damages a file in place.

    Returns:
        What was done, to be read where a case fails.
    """
    content = path.read_bytes()
    special = of_kind(path)
    how = draw.choice(special) if special and draw.random() < 0.7 else draw.choice(RAW)
    try:
        path.write_bytes(how(content, draw))
    except (
        ValueError,
        IndexError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        struct.error,
    ):  # damaged too much already to be understood
        how = draw.choice(RAW)
        path.write_bytes(how(content, draw))
    return f"{how.__name__} {path.name}"


def damage_folder(folder: Path, outside: Path, draw: Draw) -> str:
    """A file of a folder goes, or something else takes its place or its side.

    Args:
        folder: Its files are touched, not those of folders in it.
        outside: A file somewhere else, to be linked to.
        draw: The generator.
    """
    path = draw.choice(sorted(file for file in folder.iterdir() if file.is_file()))
    what = draw.choice(["remove", "folder", "link out", "dangling", "loop", "link in", "more", "link to a folder"])
    if what == "more":
        draw.choice([folder / "ü🦙", folder / ("n" * 200), folder / "a\nb", folder / " "]).write_bytes(b"x")
        return what
    content = path.read_bytes()
    path.unlink()
    match what:
        case "folder":
            path.mkdir()
        case "link out":
            path.symlink_to(outside)
        case "link to a folder":
            path.symlink_to(outside.parent)
        case "dangling":
            path.symlink_to("gone")
        case "loop":
            path.symlink_to(path.name)
        case "link in":
            (folder / "blob").write_bytes(content)
            path.symlink_to("blob")
    return f"{what} {path.name}"


def listing(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder, links and empty folders included, to be compared."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found
