"""What one adapter adds to each layer, or two: how large, of which rank, and in which direction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from plainlora.adapters.shared_base import check_one_base, find_shared_base
from plainlora.base.config import load_config
from plainlora.base.identity import canonical_name, find_weight_files
from plainlora.errors import UserError
from plainlora.folders import sha256_of, staged
from plainlora.lora.delta import Delta, read_deltas
from plainlora.plots import plot_diff
from plainlora.report import package_versions, write_json
from plainlora.run.adapter_base import Base
from plainlora.run.folder import ADAPTER, lies_in
from plainlora.settings.checks import check_writable


@dataclass(frozen=True)
class Difference:
    """One or two adapters, layer by layer.

    Attributes:
        adapters: Their folders.
        deltas: The deltas of each by module.
        others: Names of what else each file holds, which is not compared.
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
        found: list[dict[str, Any] | None] = []
        for delta in (deltas.get(module) for deltas in self.deltas):
            size = delta and {"r": delta.r, "used_rank": delta.used_rank, "norm": delta.norm}
            base = self.base_norms.get(module)
            found.append(size and size | ({"relative_norm": size["norm"] / base} if base else {}))
        return found

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
    wanted = {canonical_name(f"{module}.weight", (), config): module for module in modules}
    norms = {}
    for path in find_weight_files(base.name, base.revision):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if (module := wanted.get(canonical_name(key, (), config))) is not None:
                    norms[module] = float(torch.linalg.vector_norm(file.get_tensor(key), dtype=torch.float64))
    if missing := sorted(modules - norms.keys()):
        raise UserError(f"the files of {base.name} hold no weight of {missing[0]}; leave --relative out")
    return norms


def table(difference: Difference) -> str:
    """A line for each module, for the terminal."""
    two, relative = len(difference.adapters) > 1, bool(difference.base_norms)
    width = max(map(len, [*difference.modules, "all of them"]))
    titles = ["rank", "norm"] + (["/ base"] if relative else [])
    sides = ["".join(f"{title:>10}" for title in titles)] * len(difference.adapters)
    lines = ["".join([" " * width, *sides, f"{'cosine':>10}" if two else ""])]
    for module in difference.modules:
        cells = [_cells(size, relative) for size in difference.sizes(module)]
        lines.append(
            "".join([f"{module:<{width}}", *cells, _number(difference.cosine(module)) if two else ""]).rstrip()
        )
    totals = [f"{'':>10}{norm:>10.4g}" + " " * 10 * relative for norm in difference.norms()]
    lines.append(
        "".join([f"{'all of them':<{width}}", *totals, _number(difference.overall_cosine()) if two else ""]).rstrip()
    )
    return "\n".join(lines)


def _cells(size: dict[str, Any] | None, relative: bool) -> str:
    if size is None:
        return f"{'-':>10}" * (3 if relative else 2)
    rank = f"{size['used_rank']} of {size['r']}"
    return f"{rank:>10}{size['norm']:>10.4g}" + (f"{size['relative_norm']:>10.2%}" if relative else "")


def _number(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:>10.3f}"


def check_output(output: str | Path, adapters: Sequence[str]) -> None:
    """Raises `UserError` if the output's folder is not empty, or is, holds or lies in an adapter's."""
    check_writable(str(output), "--output")
    for adapter in adapters:
        if lies_in(adapter, output) or lies_in(output, adapter):
            raise UserError(f"--output {output} is, holds or lies in the adapter {adapter}; give a folder of its own")
    if Path(output).exists() and any(Path(output).iterdir()):
        raise UserError(f"{output} already exists; give another --output")


def write(difference: Difference, output: str | Path) -> None:
    """Writes `diff.json` and `diff.png`."""
    content = {
        "adapters": [
            {"folder": adapter, "sha256": sha256_of(Path(adapter) / ADAPTER[1]), "norm": norm, "not_compared": others}
            for adapter, norm, others in zip(difference.adapters, difference.norms(), difference.others, strict=True)
        ],
        "cosine": difference.overall_cosine(),
        "modules": {
            module: {
                "adapters": difference.sizes(module),
                "base_norm": difference.base_norms.get(module),
                "cosine": difference.cosine(module),
            }
            for module in difference.modules
        },
        "versions": package_versions(),
    }
    with staged(Path(output).resolve()) as scratch:
        write_json(scratch / "diff.json", content)
        plot_diff(difference.adapters, content["modules"], scratch / "diff.png")
