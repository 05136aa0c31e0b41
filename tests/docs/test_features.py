"""The table of features names tests that exist, and flags and commands that are read."""

import re
from collections.abc import Iterator
from dataclasses import fields

import pytest

from plainlora.commands import VERBS
from plainlora.settings.programs import CLASSIFY, SFT
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
OF_THE_FIELD, OF_OUR_OWN = (
    [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")][1:]
    for part in PAGE.split("What none of the nine has:")
)


def flags() -> Iterator[str]:
    for program in (SFT, CLASSIFY):
        for owner in program.dataclass_types:
            yield from (field.name for field in fields(owner))


def test_every_feature_of_the_field_has_a_row() -> None:
    assert len(OF_THE_FIELD) == 52
    assert len({row[0] for row in OF_THE_FIELD}) == 52
    without_test = [row[0] for row in OF_THE_FIELD if not row[2]]
    assert without_test == []


@pytest.mark.parametrize("row", [row for row in [*OF_THE_FIELD, *OF_OUR_OWN] if row[2]], ids=lambda row: row[0])
def test_the_test_of_a_row_exists_and_its_flags_are_read(row: list[str]) -> None:
    (name,) = re.findall(r"`(tests/[\w/]+\.py)`", row[2])
    assert (ROOT / name).is_file()
    known = set(flags()) | {"adapter", "weights", "devices", "architectures"}  # of commands
    assert set(re.findall(r"--([a-z_0-9]+)", row[1])) <= known
    for verb in re.findall(r"`plainlora (\w+)", row[1]):
        assert verb in VERBS
