"""What comes from elsewhere gets no more memory than it is given, and nothing after it has less."""

import resource
import threading
import time

import pytest

from plainlora.memory_limit import memory_limit


def test_only_the_block_is_limited_and_says_what_it_had() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError, match="more than 64 MiB of memory"), memory_limit(1 << 26):
        bytearray(1 << 27)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with memory_limit(1 << 28):
        assert len(bytearray(1 << 27)) == 1 << 27


def test_a_lower_limit_stays_in_force() -> None:
    with memory_limit(1 << 26):
        low = resource.getrlimit(resource.RLIMIT_AS)
        with memory_limit(1 << 40):
            assert resource.getrlimit(resource.RLIMIT_AS) == low


def test_another_thread_sets_none_and_it_costs_next_to_nothing() -> None:
    found = []
    before = resource.getrlimit(resource.RLIMIT_AS)

    def look() -> None:
        with memory_limit(1 << 20):
            found.append(resource.getrlimit(resource.RLIMIT_AS))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
    started = time.perf_counter()
    for _ in range(1000):
        with memory_limit(1 << 30):
            pass
    assert time.perf_counter() - started < 0.5  # of a row, 0.5 ms
