"""The table of bases and devices is what the code counts now."""

import importlib
from pathlib import Path

import pytest

from tests.conftest import ROOT

plan = importlib.import_module("docs.several-devices.plan")
TABLE = (ROOT / "docs" / "several-devices" / "plans.md").read_text(encoding="utf-8").splitlines()


def rows(base: str) -> list[str]:
    return [line for line in TABLE if line.startswith(f"| {base} |")]


@pytest.mark.parametrize(
    "base",
    [
        pytest.param("7B", marks=pytest.mark.integration),
        pytest.param("13B", marks=pytest.mark.slow),
        pytest.param("70B", marks=pytest.mark.slow),
    ],
)
def test_the_table_is_what_the_code_counts(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert plan.lines(base) == rows(base)


def test_the_page_shows_the_tables_as_they_were_written() -> None:
    page = (ROOT / "docs" / "several-devices-memory.md").read_text(encoding="utf-8")
    for name in ("plans.md", "measured.md"):
        table = [line for line in (Path(plan.HERE) / name).read_text(encoding="utf-8").splitlines() if "|" in line]
        assert len(table) > 2
        for line in table:
            assert line in page
    assert len(TABLE) == 2 + len(plan.BASES) * len(plan.DEVICES)
