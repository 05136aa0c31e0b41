"""Checks the files of a base on this disk."""

from pathlib import Path
from typing import Literal

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from plainlora.json_files import read_mapping

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/"  # the beginning of a Git LFS pointer file
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


def find_fault(folder: Path, what: Literal["model", "tokenizer"]) -> str | None:
    """What is wrong with the files of a local base, and what to do; `None` if nothing is found.

    Only sizes and headers are read.

    Args:
        folder: The base's folder.
        what: The part that could not be loaded.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and _begins_as_pointer(path):
            return f"{path} is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`"
    if what == "tokenizer":
        fault = f"{folder} holds no tokenizer (no {TOKENIZERS[0]} or the like); copy the base's tokenizer files there"
        return None if any((folder / name).is_file() for name in TOKENIZERS) else fault
    for path in _weights_in(folder):
        if not path.is_file():
            return f"{path} is missing, which {INDEX} names; copy it too"
        if path.stat().st_size == 0:
            return f"{path} is empty; copy it again"
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path} is cut short or damaged ({error}); copy it again"
    return None


def _begins_as_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def _weights_in(folder: Path) -> list[Path]:
    """The safetensors files that would be loaded."""
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    return [folder / name for name in _shards(folder / INDEX)] if (folder / INDEX).is_file() else []


def _shards(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in read_mapping(index)["weight_map"].values()})
    except (ValueError, KeyError, AttributeError):
        return []


def is_on_disk(name: str, revision: str | None) -> bool:
    """Whether a base's weights are in a local folder or in the Hub's cache, so that nothing is downloaded."""
    if Path(name).expanduser().exists():
        return True
    if isinstance(try_to_load_from_cache(name, WHOLE, revision=revision), str):
        return True
    index = try_to_load_from_cache(name, INDEX, revision=revision)
    shards = _shards(Path(index)) if isinstance(index, str) else []
    return bool(shards) and all(
        isinstance(try_to_load_from_cache(name, shard, revision=revision), str) for shard in shards
    )
