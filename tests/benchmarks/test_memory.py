"""The peak memory of this process."""

import torch

from benchmarks.memory import PeakMemory


def test_the_peak_includes_what_was_held_for_a_moment_alone() -> None:
    size = 300 * 2**20
    memory = PeakMemory("cpu")
    memory.start()
    torch.ones(size, dtype=torch.uint8)
    assert 0.99 * size < memory.peak() - memory.before < 1.1 * size  # some of what was there before may go
    memory.start()
    assert memory.peak() - memory.before < 0.1 * size
