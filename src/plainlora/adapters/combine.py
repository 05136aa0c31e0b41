"""Combines several adapters of one base into one adapter, by their files alone: task arithmetic on LoRA.

    cat     D = sum_i w_i D_i, exactly, of the rank sum_i r_i
    linear  PEFT's `add_weighted_adapter(..., "linear")`, of the adapters' own rank: not that sum

PEFT's own `add_weighted_adapter` needs the whole model in memory, and keeps `use_rslora` of the first adapter, with
which its result is scaled by sqrt(r):
https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/model.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig

from plainlora.adapters.output import check_output
from plainlora.adapters.shared_base import find_shared_base
from plainlora.errors import UserError
from plainlora.folders import check_disk, sha256_of, staged
from plainlora.hub.model_card import plain_card
from plainlora.lora.delta import Delta, add_factors, concatenate, read_deltas
from plainlora.lora.errors import some
from plainlora.lora.interchange import LORA_WEIGHTS, PREFIX, read_config, write_adapter
from plainlora.lora.targets import condense
from plainlora.report import package_versions, write_json
from plainlora.run.adapter_base import Base, class_labels, load_tokenizer_of, read_run, skeleton_of
from plainlora.run.folder import ADAPTER

Combination = Literal["cat", "linear"]
FORMULAS: dict[Combination, Callable[[Sequence[Delta], Sequence[float], torch.dtype], Delta]] = {
    "cat": concatenate,
    "linear": add_factors,
}


@dataclass(frozen=True)
class Combined:
    """The result of `combine_adapters`.

    Attributes:
        r: The rank of the written adapter.
        modules: How many modules it adapts.
        deviation: `||D - sum_i w_i D_i|| / sum_i |w_i| ||D_i||` of the written file, Frobenius norms: the largest of
            all modules (dimensionless).
        warnings: Warnings for the user.
    """

    r: int
    modules: int
    deviation: float
    warnings: list[str]


def _check_weights(adapters: Sequence[str], weights: Sequence[float]) -> None:
    if len(weights) != len(adapters):
        raise UserError(
            f"--weights: {len(adapters)} adapters need {len(adapters)} weights, and there are {len(weights)}"
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"--weights: {weight} is not a finite number")


def _read(adapter: str) -> dict[str, Delta]:
    """The deltas of an adapter that holds nothing else."""
    if class_labels(adapter) is not None:
        raise UserError(f"{adapter} is a classifier's, whose head cannot be combined with another's")
    deltas, others = read_deltas(adapter)
    if others:
        raise UserError(f"{adapter} also holds {some(others)}, which is no product of A and B and is not combined")
    return deltas


def _combine(
    parents: Sequence[dict[str, Delta]], adapters: Sequence[str], weights: Sequence[float], combination: Combination
) -> dict[str, Delta]:
    """The combined delta of every module that any of the adapters has. One that lacks it adds nothing to it."""
    factors = [factor for deltas in parents for each in deltas.values() for factor in (each.lora_A, each.lora_B)]
    dtype = reduce(torch.promote_types, (factor.dtype for factor in factors), torch.float32)
    combined = {}
    for module in dict.fromkeys(name for deltas in parents for name in deltas):
        having = [number for number, deltas in enumerate(parents) if module in deltas]
        deltas = [parents[number][module] for number in having]
        for what, values in (("shape", [each.shape for each in deltas]), ("rank", [each.r for each in deltas])):
            if len(set(values)) > 1 and (what == "shape" or combination == "linear"):
                said = ", ".join(
                    f"{value} in {adapters[number]}" for number, value in zip(having, values, strict=True)
                )
                advice = (
                    "they belong to different bases" if what == "shape" else "linear needs equal ranks; cat does not"
                )
                raise UserError(f"{module} is of {what} {said}: {advice}")
        combined[module] = FORMULAS[combination](deltas, [weights[number] for number in having], dtype)
    return combined


def _padded(delta: Delta, r: int) -> Delta:
    """The same delta, padded with zeros to a rank, because some servers need one `r` for all modules."""
    missing = r - delta.r
    pad = torch.nn.functional.pad
    return Delta(pad(delta.lora_A, (0, 0, 0, missing)), pad(delta.lora_B, (0, missing)), delta.scaling)


def _write(folder: Path, combined: dict[str, Delta], parent: str, base: Base) -> int:
    """Writes PEFT's two files, and returns the rank."""
    r = max(each.r for each in combined.values())
    own, skeleton = read_config(parent), skeleton_of(parent, base)
    config = LoraConfig(
        r=r,
        lora_alpha=r,  # scaling 1: the weights and the adapters' own scalings are in A
        fan_in_fan_out=own.fan_in_fan_out,
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path or base.name,
        revision=own.revision,
    )
    config.target_modules = sorted(combined) if skeleton is None else condense(list(combined), skeleton)
    config.auto_mapping = own.auto_mapping
    tensors = {
        PREFIX + module + end: factor
        for module, delta in combined.items()
        for end, factor in zip(LORA_WEIGHTS, (_padded(delta, r).lora_A, _padded(delta, r).lora_B), strict=True)
    }
    check_disk(folder, sum(tensor.nbytes for tensor in tensors.values()), f"the adapter in {folder.parent}")
    write_adapter(tensors, config, folder)
    return r


def _deviation(written: dict[str, Delta], parents: Sequence[dict[str, Delta]], weights: Sequence[float]) -> float:
    """See `Combined.deviation`. Each difference is a delta itself, `1 D - w_1 D_1 - w_2 D_2 ...`."""
    worst = 0.0
    for module, delta in written.items():
        terms = [(deltas[module], weight) for deltas, weight in zip(parents, weights, strict=True) if module in deltas]
        scale = sum(abs(weight) * each.norm for each, weight in terms)
        if scale > 0:
            signed = [1.0, *(-weight for _, weight in terms)]
            difference = concatenate([delta, *(each for each, _ in terms)], signed, torch.float64)
            worst = max(worst, difference.norm / scale)
    return worst


def combine_adapters(
    adapters: Sequence[str],
    weights: Sequence[float],
    output: str | Path,
    combination: Combination = "cat",
    overwrite: bool = False,
    *,
    base_model: str | None = None,
    allow_other_base: bool = False,
) -> Combined:
    """Combines several adapters into one: PEFT's files, the first one's tokenizer, a record and a card that name them.

    No weights of the base are loaded. What was written is read again and compared with the weighted sum in fp64.

    Args:
        adapters: Their folders.
        weights: One for each: any finite number.
        output: Folder for the adapter; it must be missing or empty, unless `overwrite`.
        combination: `cat` or `linear`, see this module.
        overwrite: Whether an earlier combination there is replaced. Nothing else is ever replaced.
        base_model: See `find_shared_base`.
        allow_other_base: See `find_shared_base`.

    Raises:
        UserError: Wrong weights, an output that cannot be written, adapters that share no base, or tensors that are no
            product of A and B; for `linear`, different ranks.
        LoRAError: An adapter cannot be read, does not fit the base, or is of a variant of LoRA.
    """
    _check_weights(adapters, weights)
    earlier = overwrite and "combination" in read_run(output)
    advice = " (it holds no combination of adapters)" if overwrite else ", or replace it with --overwrite"
    check_output(output, adapters, replaced=earlier, advice=advice)
    output = Path(output).resolve()
    bases = find_shared_base(adapters, base_model, allow_other_base)
    tokenizers = [load_tokenizer_of(adapter, base) for adapter, base in zip(adapters, bases, strict=True)]
    parents = [_read(adapter) for adapter in adapters]
    combined = _combine(parents, adapters, weights, combination)
    with staged(output) as scratch:
        r = _write(scratch, combined, adapters[0], bases[0])
        deviation = _deviation(read_deltas(scratch)[0], parents, weights)
        tokenizers[0].save_pretrained(scratch)
        record = {
            "adapters": [
                {"folder": adapter, "weight": weight, "sha256": sha256_of(Path(adapter) / ADAPTER[1])}
                for adapter, weight in zip(adapters, weights, strict=True)
            ],
            "combination": combination,
            "deviation_from_weighted_sum": deviation,
            "base": bases[0].trained_on or bases[0].identity,
            "quantization_config": read_run(adapters[0]).get("quantization_config"),
            "versions": package_versions(),
        }
        write_json(scratch / "run.json", record)
        figures = {"combination": combination, "r": r, "largest difference from the weighted sum, relative": deviation}
        figures |= {f"weight of {adapter}": weight for adapter, weight in zip(adapters, weights, strict=True)}
        named = read_config(scratch).base_model_name_or_path
        card = plain_card(output, "peft", "text-generation", str(named), figures)
        (scratch / "README.md").write_text(card, encoding="utf-8")
    warnings = [base.warning for base in bases if base.warning]
    warnings += [
        f"{adapter} has another chat template than {adapters[0]}, whose tokenizer is written"
        for adapter, tokenizer in zip(adapters, tokenizers, strict=True)
        if tokenizer.chat_template != tokenizers[0].chat_template
    ]
    return Combined(r, len(combined), deviation, warnings)
