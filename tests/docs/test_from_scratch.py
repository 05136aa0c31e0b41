"""The code of docs/from-scratch.md runs from top to bottom, and what it prints is what the page says."""

import re
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))
import tutorial

PAGE = ROOT / "docs" / "from-scratch.md"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]\d+)?")


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def test_the_page_says_what_its_code_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    found = [(said, printed) for said, printed in tutorial.run(PAGE.read_text(), names) if said or printed]
    assert len(found) == 10
    for said, printed in found:
        assert NUMBER.sub("N", printed) == NUMBER.sub("N", said)
    figures = [numbers(printed) for _, printed in found]
    parameters, _, before, after = figures[0]
    assert parameters == 93184
    assert after < 0.2 < 1.5 < before
    assert figures[1][0] < 1e-5  # from scratch and PlainLoRA: rounding
    assert figures[1][1] == 0  # PlainLoRA and PEFT: nothing
    assert found[2][1].endswith("True\n")
    rank, fixed, divided, root = figures[3][4:8]
    assert rank == 32
    assert divided < 0.7 < root < 1.4 < 3 < fixed
    base, zero, drawn = figures[4]
    assert base == zero < drawn - 1
    assert figures[7][0] > 6 * figures[7][1]  # NF4
    assert figures[8][-1] < 1e-5  # merged
    assert 0.3 < figures[9][-1] < 0.9  # fused
