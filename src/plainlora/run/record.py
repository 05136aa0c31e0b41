"""`run.json`: the record of a run, which identifies it and from which its adapter is loaded and the run reproduced.

It is written before training and completed at the end. Its digests follow the order of a run: base, rows, adapter at
the start, order of the rows, adapter at the end. The first one that differs shows where two runs diverged.
"""

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn

from plainlora.folders import sha256_of
from plainlora.report import package_versions, write_json
from plainlora.run.folder import weight_files
from plainlora.settings.secrets import SECRETS, config_without_secrets, without_secrets


def _config_of(command: Sequence[str]) -> dict[str, Any] | None:
    """The content of a command's YAML without secrets, because the file may change later."""
    paths = [word.removeprefix("--config=") for word in command if word.startswith("--config=")]
    paths += [value for flag, value in itertools.pairwise(command) if flag == "--config"]
    return config_without_secrets(paths[0]) if paths else None


def _git_commit() -> str | None:
    """The commit of this package's checkout, with `+` if files differ from it; `None` outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def digest_of_rows(rows: Dataset) -> str:
    """SHA-256 of the rows' token ids and labels, in their order."""
    digest = hashlib.sha256()
    for batch in rows.iter(batch_size=1000):
        digest.update(json.dumps([batch["input_ids"], batch["labels"]]).encode())
    return digest.hexdigest()


def digest_of_trained(model: nn.Module) -> str:
    """SHA-256 of the names and values of all weights that are trained."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + content.numpy().tobytes())
    return digest.hexdigest()


def resolve_arguments(arguments: Sequence[Any]) -> dict[str, Any]:
    """Every setting by name, without tokens.

    Args:
        arguments: The parsed dataclasses.
    """
    resolved: dict[str, Any] = {}
    for part in arguments:
        values = part.to_dict() if hasattr(part, "to_dict") else asdict(part) if is_dataclass(part) else {}  # type: ignore[arg-type]
        resolved |= {name: value for name, value in values.items() if name not in SECRETS}
    return resolved


def write_run(
    path: str | Path,
    arguments: Sequence[Any],
    *,
    quantization: dict[str, Any] | None,
    base: dict[str, Any],
    rows: Mapping[str, Dataset | None],
    model: nn.Module,
    labels: Sequence[str] | None = None,
    parent: dict[str, Any] | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Writes the record before the first step, and returns it.

    Args:
        path: The file.
        arguments: The parsed dataclasses; all their settings are written, except tokens.
        quantization: The base's quantisation, from which a merge can restore the weights of training.
        base: From `plainlora.base.identity.describe_base`.
        rows: The encoded rows of every split.
        model: The model with its initial adapter.
        labels: A classifier's classes, to load its head later.
        parent: From `Parent.describe`, of the adapter that is trained on.
        backend: The name of the back end that trains the adapter.
    """
    content = {
        "command": without_secrets(sys.argv),
        "config": _config_of(sys.argv),
        "arguments": resolve_arguments(arguments),
        "quantization_config": quantization,
        "labels": None if labels is None else list(labels),
        "versions": package_versions(),
        "git_commit": _git_commit(),
        "processes": PartialState().num_processes,
        "threads": torch.get_num_threads(),
        "device": str(PartialState().device.type),
        "base": base,
        "parent": parent,
        "lora_backend": backend,
        "rows": {
            split: {"rows": len(each), "sha256": digest_of_rows(each)}
            for split, each in rows.items()
            if each is not None
        },
        "trained_at_start_sha256": digest_of_trained(model),
    }
    write_json(path, content)
    return content


def complete_run(path: str | Path, run: dict[str, Any], order: str, steps: int) -> None:
    """Writes the record again, completed after the last step.

    Args:
        path: The file; it may have been deleted meanwhile.
        run: The record from `write_run`.
        order: Digest of the batches in the order of training, from `training.rows_seen.RowsSeen`.
        steps: Number of optimizer steps.
    """
    weights = describe_weights(Path(path).parent)
    write_json(path, run | {"order_sha256": order, "steps": steps, "weights": weights})


def describe_weights(folder: Path) -> dict[str, str]:
    """The file of a run's weights and its SHA-256; of several files the first, and the SHA-256 of all their SHA-256.

    Raises:
        UserError: A file is missing.
    """
    files = weight_files(folder)
    digests = [sha256_of(file) for file in files]
    whole = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return {"file": files[0].name, "sha256": whole}
