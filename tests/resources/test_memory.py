"""What the kernel says of this process, its device and its control group."""

import mmap
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from plainlora.resources.memory import free_memory, left_to_cgroup, peak_memory, reset_peak_memory, resident_memory
from tests.two_processes import in_two_processes


def test_free_memory_is_what_the_kernel_says_or_unknown() -> None:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert total / 1000 < free < total
    assert free_memory(torch.device("meta")) is None


def test_the_process_knows_what_it_holds_and_has_held() -> None:
    before, piece = resident_memory(), b"1" * 1_000_000
    with mmap.mmap(-1, 100 * len(piece)) as held:  # not from the allocator, which may have as much at hand
        for _ in range(100):
            held.write(piece)
        assert resident_memory() - before == pytest.approx(len(held), rel=0.1)
    assert resident_memory() - before < 2e7
    assert peak_memory(torch.device("cpu"))["peak_memory_bytes"] >= before + 9e7


def test_a_run_on_a_cpu_asks_its_process_whatever_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.delattr(torch.cuda, name)
    reset_peak_memory(torch.device("cpu"))
    found = peak_memory(torch.device("cpu"))
    assert found.keys() == {"peak_memory_bytes"}
    assert found["peak_memory_bytes"] >= resident_memory()


def test_a_run_on_a_gpu_is_told_what_its_own_device_held_since_training_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards; the answers of Torch are put in."""
    allocated, reserved = {0: 900, 1: 500}, {0: 1000, 1: 700}
    at = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update({device.index: 100}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated[device.index])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: reserved[device.index])
    assert peak_memory(at) == {"peak_memory_bytes": 500, "peak_memory_reserved_bytes": 700}
    reset_peak_memory(at)
    assert peak_memory(at) == {"peak_memory_bytes": 100, "peak_memory_reserved_bytes": 700}
    assert peak_memory(torch.device("cuda", 0)) == {"peak_memory_bytes": 900, "peak_memory_reserved_bytes": 1000}


def hold(rank: int) -> dict[str, int]:
    """The second process holds 200 MB more."""
    PartialState(cpu=True)  # as training arguments make it
    held = torch.ones(rank * 50_000_000)
    return peak_memory(held.device) | {"mine": resident_memory()}


def test_of_several_processes_the_one_that_held_most_counts(tmp_path: Path) -> None:
    one, other = in_two_processes(tmp_path, hold)
    assert one["peak_memory_bytes"] == other["peak_memory_bytes"] >= other["mine"] - 1e7
    assert other["mine"] > one["mine"] + 1e8


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 5\ninactive_file 200\n"}, 500),
        ({"memory.max": "max\n", "memory.current": "700\n", "memory.stat": "inactive_file 200\n"}, None),
        (
            {
                "memory.limit_in_bytes": "1000",
                "memory.usage_in_bytes": "700",
                "memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            500,
        ),
        ({}, None),
    ],
)
def test_a_control_group_leaves_its_limit_less_what_is_used_and_cannot_go(
    files: dict[str, str], left: int | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert left_to_cgroup(tmp_path) == left
