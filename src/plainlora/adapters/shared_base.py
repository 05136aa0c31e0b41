"""Whether several adapters can share a base: they were trained on the same weights, stored in the same way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plainlora.base.identity import describe_base, find_difference, name_base
from plainlora.errors import UserError
from plainlora.lora.config import find_unsupported
from plainlora.lora.errors import LoRAError, some
from plainlora.lora.interchange import read_config
from plainlora.peft_model.config import changes_base
from plainlora.run.adapter_base import Base, base_of, find_base, read_run

# The fields of a quantisation config that decide the values of the weights.
STORAGE = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def check_one_base(adapters: Sequence[str], same_weights: bool = True) -> None:
    """Checks by their files that adapters can share a base. No base is read, unless it has several names.

    Args:
        adapters: Their folders.
        same_weights: Whether they must have been trained on the same weights.

    Raises:
        UserError: Another base or storage in training, a folder given twice, or an adapter that changes its base.
        LoRAError: A folder holds no adapter.
    """
    places = [Path(adapter).resolve() for adapter in adapters]
    for number, adapter in enumerate(adapters):
        config = read_config(adapter)
        if len(adapters) > 1 and changes_base(config):
            fields = some(list(find_unsupported(config).values()))
            raise UserError(f"{adapter} has {fields}, for which PEFT changes the base, so it cannot share one")
        if places[number] in places[:number]:
            raise UserError(f"{adapter} is given twice; name each adapter once")
        if number:
            _check_storage(adapters[0], adapter)
        if number and same_weights:
            _check_weights(adapters[0], adapter)


def _check_storage(first: str, adapter: str) -> None:
    runs = read_run(first), read_run(adapter)
    if all(runs) and len({_storage(run) for run in runs}) > 1:
        raise UserError(
            f"{adapter} was trained on {_storage(runs[1])}, and {first} on {_storage(runs[0])}, so they share no base"
        )


def _storage(run: dict[str, Any]) -> str:
    config = run["quantization_config"] or {}
    return ", ".join(f"{name}={config[name]}" for name in STORAGE if config.get(name)) or "weights not quantised"


def _check_weights(first: str, adapter: str) -> None:
    recorded = [read_run(each).get("base") for each in (first, adapter)]
    if not all(recorded):
        names = [(config.base_model_name_or_path, config.revision) for config in map(read_config, (first, adapter))]
        if names[0] == names[1]:
            return
    known, other = (
        base or describe_base(*base_of(each)) for base, each in zip(recorded, (first, adapter), strict=True)
    )
    if find_difference(known, other) is not None:
        raise UserError(
            f"{adapter} was trained on {name_base(other)}, and {first} on {name_base(known)}, so they share no base"
        )


def find_shared_base(
    adapters: Sequence[str], base_model: str | None = None, allow_other_base: bool = False
) -> list[Base]:
    """The one base of several adapters, checked for each of them; no weights are loaded.

    Args:
        adapters: Their folders.
        base_model: Hub id or folder to use instead of the base that the adapters name.
        allow_other_base: See `plainlora.run.adapter_base.find_base`.

    Returns:
        The same base for each adapter, with the warning that is the adapter's own.

    Raises:
        UserError: See `check_one_base` and `find_base`.
        LoRAError: See `find_base`.
    """
    check_one_base(adapters, same_weights=base_model is None)
    bases = []
    for adapter in adapters:
        try:
            bases.append(find_base(adapter, base_model, allow_other_base))
        except LoRAError as error:
            if len(adapters) == 1 or adapter in str(error):
                raise
            raise LoRAError(f"{adapter}: {error}") from error
    return bases
