"""Interleaved timing in real processes, and variants that fail."""

import multiprocessing

import pytest

from benchmarks.case import Case
from benchmarks.interleave import time_interleaved
from plainlora.errors import UserError


def test_a_variant_that_fails_is_named_and_the_others_end() -> None:
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": False, "p": 0.0, "tokens": 4, "passes": 1}
    case = Case("layer", "broken", {"floor": {}, "fused": {"p": 2.0}}, shape)
    with pytest.raises(
        UserError, match=r"^bench: layer, broken, fused stopped \(LoRAError: lora_dropout must lie in"
    ) as told:
        time_interleaved("layer", case, "cpu", 1)
    assert "in run_variant" in told.value.__notes__[0]


def test_a_variant_that_stops_before_it_is_timed_says_why() -> None:
    case = Case("layer", "broken", {"floor": {}, "fused": {}})

    def wait_for_the_end(said: str) -> None:
        for child in multiprocessing.active_children() if "loads" in said else ():
            child.join(60)

    with pytest.raises(UserError, match=r"^bench: layer, broken, floor stopped \(ModuleNotFoundError: No module"):
        time_interleaved("no_such_module", case, "cpu", 1, progress=wait_for_the_end)


def test_a_variant_loads_when_the_one_before_is_ready() -> None:
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": False, "p": 0.0, "tokens": 4, "passes": 1}
    case = Case("layer", "broken", {"floor": {}, "fused": {"p": 2.0}, "peft": {}}, shape)
    said: list[str] = []
    with pytest.raises(UserError, match="fused stopped"):
        time_interleaved("layer", case, "cpu", 1, progress=said.append)
    assert [line.rpartition(", ")[2] for line in said if "loads" in line] == ["floor", "fused"]


def test_a_case_keeps_to_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that would end later are left out, and a variant that hangs is given up."""
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": False, "p": 0.0, "tokens": 4, "passes": 1}
    case = Case("layer", "small", {"floor": {}, "fused": {}}, shape)
    outcome = time_interleaved("layer", case, "cpu", 50, seconds=0)
    assert {name: len(seconds) for name, seconds in outcome.seconds.items()} == {"floor": 1, "fused": 1}
    monkeypatch.setattr("benchmarks.interleave.GRACE", 0.0)
    with pytest.raises(UserError, match=r"^bench: layer, small, floor did not answer in time$"):
        time_interleaved("layer", case, "cpu", 1, seconds=0)


def test_every_variant_is_timed_once_in_every_round() -> None:
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": True, "p": 0.1, "tokens": 4, "passes": 1}
    case = Case("layer", "small", {"floor": {}, "fused": {}, "peft": {}}, shape)
    said: list[str] = []
    outcome = time_interleaved("layer", case, "cpu", 2, progress=said.append)
    order = [line.rpartition(", ")[2] for line in said if "round" in line]
    assert order == ["floor", "fused", "peft"] * 3
    assert {name: len(seconds) for name, seconds in outcome.seconds.items()} == {
        "floor": 2,
        "fused": 2,
        "peft": 2,
    }


def test_a_variant_that_is_killed_is_named() -> None:
    """As the system does where memory runs out."""
    shape = {"d_in": 8, "d_out": 8, "r": 2, "transposed": True, "p": 0.1, "tokens": 4, "passes": 1}
    case = Case("layer", "small", {"floor": {}, "fused": {}}, shape)

    def kill(said: str) -> None:
        if said.endswith("round 1 of 2, fused"):
            (_, fused) = sorted(
                multiprocessing.active_children(), key=lambda child: int(child.name.rpartition("-")[2])
            )
            fused.kill()
            fused.join()

    with pytest.raises(
        UserError, match=r"^bench: layer, small, fused was killed; most likely there is too little memory"
    ):
        time_interleaved("layer", case, "cpu", 2, progress=kill)
