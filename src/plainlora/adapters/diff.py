"""Compares the deltas of one or two adapters, layer by layer: norm, rank, and the cosine between them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from plainlora.adapters.shared_base import check_one_base, find_shared_base
from plainlora.base.config import load_config
from plainlora.base.identity import canonical_name, find_weight_files
from plainlora.errors import UserError
from plainlora.folders import sha256_of, staged
from plainlora.lora.delta import Delta, read_deltas
from plainlora.plots import plot_diff
from plainlora.report import package_versions, write_json
from plainlora.run.adapter_base import Base
from plainlora.run.folder import ADAPTER


@dataclass(frozen=True)
class Difference:
    """One or two adapters, layer by layer.

    Attributes:
        adapters: Their folders.
        deltas: The deltas of each by module.
        others: Names of the other tensors in each file, which are not compared.
        base_norms: The Frobenius norm of the base's weight by module; empty if it was not asked for.
    """

    adapters: Sequence[str]
    deltas: Sequence[dict[str, Delta]]
    others: Sequence[list[str]]
    base_norms: Mapping[str, float]

    @property
    def modules(self) -> list[str]:
        """The modules that any of the adapters changes."""
        return list(dict.fromkeys(name for deltas in self.deltas for name in deltas))

    def sizes(self, module: str) -> list[dict[str, Any] | None]:
        """`r`, `used_rank`, `norm` and, with the base, `relative_norm` of each delta; `None` where there is none."""
        return [None if module not in deltas else self._size(module, deltas[module]) for deltas in self.deltas]

    def _size(self, module: str, delta: Delta) -> dict[str, Any]:
        size: dict[str, Any] = {"r": delta.r, "used_rank": delta.used_rank, "norm": delta.norm}
        if (base := self.base_norms.get(module)) is not None:
            size["relative_norm"] = delta.norm / base if base else None
        return size

    def cosine(self, module: str) -> float | None:
        """The cosine between both deltas; `None` if one of the two is missing or 0."""
        both = [deltas[module] for deltas in self.deltas if module in deltas]
        return both[0].cosine(both[1]) if len(both) > 1 else None

    def norms(self) -> list[float]:
        """The norm of each adapter's deltas together."""
        return [math.hypot(*(each.norm for each in deltas.values())) for deltas in self.deltas]

    def overall_cosine(self) -> float | None:
        """The cosine between all deltas of one adapter and all of the other, a missing one being 0."""
        if len(self.deltas) < 2 or 0 in self.norms():
            return None
        first, second = self.deltas
        inner = sum(
            (first[name].cosine(second[name]) or 0.0) * first[name].norm * second[name].norm
            for name in first.keys() & second.keys()
        )
        return inner / math.prod(self.norms())


def compare_adapters(adapters: Sequence[str], relative: bool = False, base_model: str | None = None) -> Difference:
    """Compares one or two adapters by their files; no weights of the base are loaded, and its norms only on demand.

    Args:
        adapters: One folder or two.
        relative: Whether the base's norms are read, a weight at a time.
        base_model: Hub id or folder to read them from, instead of the base that the adapters name.

    Raises:
        UserError: The adapters share no base, or no module; or the base's files cannot be read.
        LoRAError: An adapter cannot be read, or is of a variant of LoRA.
    """
    check_one_base(adapters)
    read = [read_deltas(adapter) for adapter in adapters]
    deltas = [each for each, _ in read]
    common = set.intersection(*(set(each) for each in deltas))
    if not common:
        raise UserError(f"{adapters[0]} and {adapters[1]} change no module in common, so there is nothing to compare")
    for module in common:
        if len(shapes := {each[module].shape for each in deltas}) > 1:
            raise UserError(
                f"{module} is of the shapes {', '.join(map(str, shapes))}: the adapters are of different bases"
            )
    norms = _base_norms(find_shared_base(adapters, base_model)[0], set().union(*deltas)) if relative else {}
    return Difference(adapters, deltas, [others for _, others in read], norms)


def _base_norms(base: Base, modules: set[str]) -> dict[str, float]:
    """The Frobenius norms of the base's weights, in fp64."""
    config = load_config(base.name, base.revision)
    wanted = {canonical_name(f"{module}.weight", (), config) or f"{module}.weight": module for module in modules}
    norms = {}
    for path in find_weight_files(base.name, base.revision):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if (module := wanted.get(canonical_name(key, (), config) or "")) is not None:
                        norms[module] = float(torch.linalg.vector_norm(file.get_tensor(key), dtype=torch.float64))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: its weights have no norm ({error}); leave --relative out") from error
    if missing := sorted(modules - norms.keys()):
        raise UserError(f"the files of {base.name} hold no weight of {missing[0]}; leave --relative out")
    return norms


def table(difference: Difference) -> str:
    """A line for each module, for the terminal; the columns of two adapters are numbered."""
    numbers = (
        [f" {number}" for number, _ in enumerate(difference.adapters, 1)] if len(difference.adapters) > 1 else [""]
    )
    columns = ["rank", "norm", *(["/ base"] if difference.base_norms else [])]
    rows = [
        ["", *(f"{column}{number}" for number in numbers for column in columns), *(["cosine"] * (len(numbers) > 1))]
    ]
    for module in difference.modules:
        cells = [cell for size in difference.sizes(module) for cell in _cells(size)[: len(columns)]]
        rows.append([module, *cells, _number(difference.cosine(module), ".3f")])
    totals = [cell for norm in difference.norms() for cell in ["", f"{norm:.4g}", ""][: len(columns)]]
    rows.append(["all of them", *totals, _number(difference.overall_cosine(), ".3f")])
    rows = [row[: len(rows[0])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join(lines)


def _cells(size: dict[str, Any] | None) -> list[str]:
    if size is None:
        return ["-", "-", "-"]
    return [f"{size['used_rank']} of {size['r']}", f"{size['norm']:.4g}", _number(size.get("relative_norm"), ".2%")]


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def write(difference: Difference, output: str | Path) -> None:
    """Writes `diff.json` and `diff.png`."""
    modules: dict[str, dict[str, Any]] = {
        module: {
            "adapters": difference.sizes(module),
            "base_norm": difference.base_norms.get(module),
            "cosine": difference.cosine(module),
        }
        for module in difference.modules
    }
    content = {
        "adapters": [
            {"folder": adapter, "sha256": sha256_of(Path(adapter) / ADAPTER[1]), "norm": norm, "not_compared": others}
            for adapter, norm, others in zip(difference.adapters, difference.norms(), difference.others, strict=True)
        ],
        "cosine": difference.overall_cosine(),
        "modules": modules,
        "versions": package_versions(),
    }
    with staged(Path(output).resolve()) as scratch:
        write_json(scratch / "diff.json", content)
        plot_diff(difference.adapters, modules, scratch / "diff.png")
