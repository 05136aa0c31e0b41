"""What newer versions of PEFT have, and what takes its place where an older one is installed."""

from typing import Any

try:
    from peft.utils.error import NoMatchingPeftModuleError
except ImportError:  # before PEFT 0.21, which raises a plain ValueError

    class NoMatchingPeftModuleError(ValueError):  # type: ignore[no-redef]
        """Never raised."""


try:
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
        convert_peft_config_for_transformers,
    )
except ImportError:  # before PEFT 0.21, which renames nothing

    def convert_peft_adapter_state_dict_for_transformers(**options: Any) -> Any:  # type: ignore[misc]
        """The adapter's tensors as they are."""
        return options["adapter_state_dict"]

    def convert_peft_config_for_transformers(*_: Any) -> None:  # type: ignore[misc]
        """The config as it is."""


__all__ = [
    "NoMatchingPeftModuleError",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]
