"""What the kernel says of this process, its device and its control group."""

from pathlib import Path

import pytest
import torch

from plainlora.resources.memory import free_memory, left_to_cgroup, peak_memory, resident_memory


def test_free_memory_is_what_the_kernel_says_or_unknown() -> None:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert total / 1000 < free < total
    assert free_memory(torch.device("meta")) is None


def test_the_process_knows_what_it_holds_and_has_held() -> None:
    before = resident_memory()
    held = torch.ones(25_000_000)  # 100 MB, mapped apart
    assert resident_memory() - before == pytest.approx(held.nbytes, rel=0.1)
    del held
    assert resident_memory() - before < 2e7
    assert peak_memory() >= before + 9e7


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
