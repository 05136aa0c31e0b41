"""Identifies a base by its checkpoint's files, so that an adapter is not put on another base unnoticed.

A name is not enough: a folder can be trained further, a branch on the Hub moves. `run.json` holds the result of
`describe_base`, which is compared when the adapter is loaded (peft#1384, qlora#254).
"""

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_MAPPING, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from plainlora.base.config import load_config
from plainlora.errors import UserError, first_line
from plainlora.json_files import read_mapping

WHOLE = 1 << 30  # bytes: a checkpoint up to this size is read whole, a larger one in samples
ROWS = 16  # read of every matrix of a larger one
VALUES = 32  # numbers recorded, to recognise the same weights in another precision
BFLOAT16_ROUNDING = 2**-8  # relative, with a factor of 2 to spare
HALF_SMALLEST = 1e-6  # absolute: fp16 has no normal numbers below

# GPT-2's and GPT-NeoX's published files also hold the causal mask; a checkpoint that is saved again does not.
MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$")

Difference = Literal["architecture", "tensors", "weights", "precision"]


def find_weight_files(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint, from a folder or from the Hub's cache, in the order of their names.

    Raises:
        UserError: There are none, the index is damaged, or it names a file outside of the checkpoint's folder.
    """
    single = _find_file(name, SAFE_WEIGHTS_NAME, revision)
    if single is not None:
        return [single]
    index = _find_file(name, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        raise UserError(f"{name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; weights are read from "
                        "safetensors only")  # fmt: skip
    try:
        shards = sorted(set(read_mapping(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error}); copy or download it again") from error
    files = []
    for shard in shards:
        if not _stays_inside(shard):
            raise UserError(
                f"{index} names the file {shard!r}, which is outside of its folder; do not use this checkpoint"
            )
        file = _find_file(name, shard, revision)
        if file is None:
            raise UserError(f"{index} names {shard}, which is not there; copy or download it again")
        files.append(file)
    return files


def _stays_inside(name: object) -> bool:
    if not isinstance(name, str) or not name or "\\" in name or ":" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _find_file(name: str, file: str, revision: str | None) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        found = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the files of {name!r} cannot be loaded from the Hub ({first_line(error)})") from error
    return None if found is None else Path(found)


def canonical_name(name: str, shape: tuple[int, ...], config: PretrainedConfig) -> str | None:
    """A tensor's name without the prefix that only some classes write; `None` for a tensor that may be missing."""
    model_class = MODEL_MAPPING.get(type(config), None)
    prefix = getattr(model_class, "base_model_prefix", "")
    name = name.removeprefix(f"{prefix}.") if prefix else name
    is_mask = MASKS.search(f".{name}") is not None and len(shape) != 1
    is_copy = name == "lm_head.weight" and config.get_text_config().tie_word_embeddings
    return None if is_mask or is_copy else name


def _read(file: safe_open, name: str, shape: tuple[int, ...], whole: bool) -> Iterator[torch.Tensor]:
    """Yields a whole tensor, or `ROWS` evenly spaced rows of a matrix of a large checkpoint."""
    if whole or len(shape) < 2 or math.prod(shape) == 0:
        yield file.get_tensor(name).reshape(-1)
        return
    piece = file.get_slice(name)
    for number in range(ROWS):
        at = [number * (size - 1) // (ROWS - 1) for size in shape[:-1]]
        yield piece[tuple(slice(start, start + 1) for start in at)].reshape(-1)


def _middle(file: safe_open, name: str, shape: tuple[int, ...]) -> float:
    """The number in the middle of a matrix, to six digits."""
    return float(f"{file.get_slice(name)[tuple(slice(size // 2, size // 2 + 1) for size in shape)].item():.6g}")


def describe_base(name: str, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Describes a base by its files; no model is loaded. A checkpoint above 1 GiB takes seconds.

    The order of the tensors, their distribution over files, and the prefix of their names make no difference. In
    a checkpoint of more than 1 GiB a change between the rows that are read is not seen.

    Args:
        name: Hub id or local folder.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: For `load_config`.

    Returns:
        `name`; `commit` on the Hub, or `None`; `model_type`; `dtypes` as stored; numbers of `tensors` and
        `parameters`; SHA-256 of names and shapes (`shapes`) and of names and bytes read (`weights`); whether all bytes
        were read (`whole`); and some of the numbers themselves (`values`).

    Raises:
        UserError: The base cannot be loaded, or a file is damaged.
    """
    config = load_config(name, revision, trust_remote_code)
    files = find_weight_files(name, revision)
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    try:
        with ExitStack() as stack:
            found = {}
            for path in files:
                file = stack.enter_context(safe_open(path, framework="pt"))
                for key in file.keys():  # noqa: SIM118
                    piece = file.get_slice(key)
                    shape = tuple(piece.get_shape())
                    canonical = canonical_name(key, shape, config)
                    if canonical is not None:
                        found[canonical] = (file, key, shape, piece.get_dtype())
            whole = sum(path.stat().st_size for path in files) <= WHOLE
            matrices = [key for key, (_, _, shape, _) in sorted(found.items()) if len(shape) > 1 and math.prod(shape)]
            kept = matrices[:: max(1, len(matrices) // VALUES)][:VALUES]
            values = []
            for key, (file, own, shape, _) in sorted(found.items()):
                shapes.update(f"{key} {shape}\n".encode())
                weights.update(f"{key}\n".encode())
                for row in _read(file, own, shape, whole):
                    weights.update(row.contiguous().view(torch.uint8).numpy().data)
                if key in kept:
                    values.append(_middle(file, own, shape))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the weights of {name} are corrupt or cut short ({error}); copy them again") from error
    return {
        "name": name,
        "commit": extract_commit_hash(str(files[0]), None),
        "model_type": config.model_type,
        "dtypes": sorted({dtype for _, _, _, dtype in found.values()}),
        "tensors": len(found),
        "parameters": sum(math.prod(shape) for _, _, shape, _ in found.values()),
        "shapes": shapes.hexdigest(),
        "weights": weights.hexdigest(),
        "whole": whole,
        "values": values,
    }


def find_difference(trained: dict[str, Any], found: dict[str, Any]) -> Difference | None:
    """The most serious difference between two bases; `None` if they are the same.

    Args:
        trained: `describe_base` of the base on which the adapter was trained.
        found: `describe_base` of the base to be used.

    Returns:
        `architecture`; `tensors`: other names or shapes; `weights`: other numbers; `precision`: the same numbers, as
        far as they are recorded, in another rounding.
    """
    if trained["model_type"] != found["model_type"]:
        return "architecture"
    if trained["shapes"] != found["shapes"]:
        return "tensors"
    if trained["weights"] == found["weights"]:
        return None
    return "precision" if trained["dtypes"] != found["dtypes"] and _nearly_equal(trained, found) else "weights"


def _nearly_equal(trained: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether the recorded numbers of both differ by no more than a rounding to 16 bits."""
    kept = list(zip(trained["values"], found["values"], strict=False))
    return all(math.isclose(a, b, rel_tol=BFLOAT16_ROUNDING, abs_tol=HALF_SMALLEST) for a, b in kept)


def is_description(content: object) -> bool:
    """Whether content read from a file has the form of `describe_base`'s result."""
    if not isinstance(content, dict) or not isinstance(content.get("values"), list):
        return False
    texts = all(isinstance(content.get(key), str) for key in ("name", "model_type", "shapes", "weights"))
    lists = isinstance(content.get("dtypes"), list) and all(isinstance(item, str) for item in content["dtypes"])
    texts = texts and isinstance(content.get("commit"), str | None)
    return texts and lists and all(isinstance(value, int | float) for value in content["values"])


def name_base(base: dict[str, Any]) -> str:
    """A base for a message: its name, type, commit and the digest of its weights."""
    commit = f"commit {base['commit'][:8]}, " if base.get("commit") else ""
    return f"{base['name']} ({base['model_type']}, {'/'.join(base['dtypes'])}, {commit}weights {base['weights'][:8]})"
