"""Parses the devices that a run is planned for: `8x24GB`."""

import re
from dataclasses import dataclass

from plainlora.errors import UserError

UNITS = {"": 10**9, "gb": 10**9, "gib": 2**30}


@dataclass(frozen=True)
class Devices:
    """Devices of one kind, with one process on each.

    Attributes:
        count: Number of devices.
        memory: Bytes of memory of each.
    """

    count: int
    memory: int

    @classmethod
    def parse(cls, text: str) -> "Devices":
        """Parses `8x24GB`. GB are 10^9 bytes, GiB 2^30; without a unit it is GB.

        Raises:
            UserError: The text has another form.
        """
        found = re.fullmatch(r"\s*(\d{1,6})\s*x\s*(\d{1,6}(?:\.\d+)?)\s*(|gb|gib)\s*", text, flags=re.IGNORECASE)
        if found is None:
            raise UserError(f"--devices {text!r} does not say how many and how large; write it as 8x24GB")
        count, memory = int(found[1]), int(float(found[2]) * UNITS[found[3].lower()])
        if not count or not memory:
            raise UserError(f"--devices {text!r}: neither the number nor the memory of each can be 0")
        return cls(count, memory)

    def __str__(self) -> str:
        return f"{self.count} x {self.memory / 1e9:g} GB"
