"""Devices are read as they are typed."""

import pytest

from plainlora.errors import UserError
from plainlora.resources.devices import Devices


@pytest.mark.parametrize(
    ("text", "count", "memory"),
    [
        ("8x24GB", 8, 24e9),
        ("4x80GiB", 4, 80 * 2**30),
        ("2x24", 2, 24e9),
        ("1 X 15.5gb", 1, 15.5e9),
        ("16x0.5GiB", 16, 2**29),
    ],
)
def test_a_number_and_a_size_are_read(text: str, count: int, memory: float) -> None:
    assert Devices.parse(text) == Devices(count, int(memory))


@pytest.mark.parametrize(
    "text", ["", "24GB", "8x", "x24GB", "8x24MB", "-8x24GB", "8x24GBx2", "8.5x24GB", "8*24GB", "²x24"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"^--devices '.*' does not say how many and how large; write it as 8x24GB$"):
        Devices.parse(text)


@pytest.mark.parametrize("text", ["0x24GB", "8x0", "8x0.0GiB"])
def test_nothing_is_no_device(text: str) -> None:
    with pytest.raises(UserError, match="neither the number nor the memory of each can be 0"):
        Devices.parse(text)
