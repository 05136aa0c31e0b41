"""How much memory a CPU process holds resident for a sequence of tensors: what is alive, and the holes between.

glibc maps blocks of 32 MiB and more apart and gives them back when they are freed. Smaller ones lie in one heap, where
a freed block becomes a hole that the best-fitting request takes. PyTorch asks for aligned blocks (`posix_memalign`):
glibc before 2.38 looks for a hole larger than the block, and the piece that is left over goes to some small object,
such as an autograd node, which stays until the backward pass. Between such pieces a hole takes no second tensor of the
same size. https://sourceware.org/git/?p=glibc.git;a=blob;f=malloc/malloc.c;hb=glibc-2.36 (`_int_memalign`)
"""

import bisect
from collections.abc import Sequence

MAPPED = 32 * 2**20  # bytes; DEFAULT_MMAP_THRESHOLD_MAX, which the threshold reaches once such blocks have been freed
ALIGNMENT, PIECE = 16, 96  # bytes: of every block; left over beside an aligned one (64 and a smallest chunk of 32)


class _Holes:
    """Free ranges of the heap; neighbours become one."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}  # by first byte
        self._starts: dict[int, int] = {}  # by the byte after the last
        self._sorted: list[tuple[int, int]] = []  # (size, start)

    def add(self, start: int, size: int) -> None:
        if size <= 0:
            return
        if (after := self._sizes.get(start + size)) is not None:
            self._remove(start + size)
            size += after
        if (before := self._starts.get(start)) is not None:
            size += self._sizes[before]
            self._remove(before)
            start = before
        self._sizes[start], self._starts[start + size] = size, start
        bisect.insort(self._sorted, (size, start))

    def _remove(self, start: int) -> None:
        size = self._sizes.pop(start)
        del self._starts[start + size]
        self._sorted.pop(bisect.bisect_left(self._sorted, (size, start)))

    def take(self, size: int) -> int | None:
        """The start of the smallest range that is large enough, of which the rest stays; `None` if there is none."""
        at = bisect.bisect_left(self._sorted, (size, -1))
        if at == len(self._sorted):
            return None
        found, start = self._sorted[at]
        self._remove(start)
        self.add(start + size, found - size)
        return start

    def take_end(self, end: int) -> int:
        """Start of the range that reaches up to the heap's end, which is taken; or that end."""
        start = self._starts.get(end)
        if start is None:
            return end
        self._remove(start)
        return start


def count_resident_bytes(events: Sequence[tuple[int, int]], pinned_until: int) -> int:
    """Bytes that a heap in which no piece beside a block comes back has grown to, mapped blocks included: a bound.

    Args:
        events: `(number of the block, its size in bytes)` where it is allocated, `(number, -size)` where it is freed.
        pinned_until: Blocks allocated by an event before this one, in the forward pass, leave pieces that stay.
    """
    holes, end, mapped, peak = _Holes(), 0, 0, 0
    starts: dict[int, int | None] = {}
    kept: dict[int, int] = {}  # bytes beside a block that do not come back with it
    for at, (number, size) in enumerate(events):
        block = -(-abs(size) // ALIGNMENT) * ALIGNMENT
        if block + PIECE >= MAPPED:
            mapped += block if size > 0 else -block
        elif size > 0:
            start = holes.take(block + PIECE)
            if start is None:
                start = holes.take_end(end)
                end = start + block + PIECE
            starts[number], kept[number] = start, PIECE if at < pinned_until else 0
        elif (freed := starts.pop(number, None)) is not None:
            holes.add(freed, block + PIECE - kept.pop(number))
        peak = max(peak, mapped + end)
    return peak
