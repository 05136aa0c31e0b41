"""What the heap model says of sequences that can be followed by hand."""

import pytest

from plainlora.resources.heap import MAPPED, PIECE, count_resident_bytes

MB = 2**20
ALIVE = 10**6  # an event number that no sequence reaches: every block is one of the forward pass


@pytest.mark.parametrize("pinned_until", [0, ALIVE])
def test_large_blocks_are_mapped_and_given_back(pinned_until: int) -> None:
    events = [(1, 2 * MAPPED), (1, -2 * MAPPED), (2, MAPPED), (3, MAPPED), (2, -MAPPED), (3, -MAPPED)]
    assert count_resident_bytes(events, pinned_until) == 2 * MAPPED


def test_a_hole_takes_the_next_block_of_its_size_where_nothing_stays_beside_it() -> None:
    again = [event for number in range(1, 20) for event in ((number, MB), (number, -MB))]
    assert count_resident_bytes([(0, MB), *again], 0) == 2 * (MB + PIECE)


def test_between_pieces_that_stay_a_hole_takes_smaller_blocks_alone() -> None:
    first = [(1, MB), (2, MB), (1, -MB)]
    assert count_resident_bytes([*first, (3, MB)], ALIVE) == 3 * (MB + PIECE)
    assert count_resident_bytes([*first, (3, MB // 2)], ALIVE) == 2 * (MB + PIECE)
    assert count_resident_bytes([*first, (3, MB)], 0) == 2 * (MB + PIECE)


def test_neighbouring_holes_become_one_and_the_last_one_is_lengthened() -> None:
    first = [(1, MB), (2, MB), (3, MB)]
    both = [*first, (1, -MB), (2, -MB), (4, 2 * MB)]
    assert count_resident_bytes(both, 0) == 3 * (MB + PIECE)
    last = [*first, (3, -MB), (4, 3 * MB)]
    assert count_resident_bytes(last, 0) == 2 * (MB + PIECE) + 3 * MB + PIECE


def test_the_best_fitting_hole_is_taken() -> None:
    holes = [(1, 4 * MB), (2, 16), (3, MB), (4, 16), (1, -4 * MB), (3, -MB)]
    end = 5 * MB + 2 * 16 + 4 * PIECE
    assert count_resident_bytes([*holes, (5, MB), (6, 4 * MB)], 0) == end
    assert count_resident_bytes([*holes, (5, 2 * MB), (6, 4 * MB)], 0) == end + 4 * MB + PIECE
