"""The errors that this folder raises on purpose, and how they list names."""

from collections.abc import Sequence

SHOWN = 3  # names


class LoRAError(ValueError):
    """A model, an adapter config or an adapter file cannot be used. The message is one line and says what to do."""


class UnsupportedError(LoRAError):
    """PEFT implements what a config or an adapter asks for, and the hand-written LoRA does not."""


def some(names: Sequence[str]) -> str:
    """`a, b, c and 4 more`."""
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
