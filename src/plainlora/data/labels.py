"""Labels as written in the rows -> class numbers."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset

from plainlora.errors import UserError


@dataclass
class Table:
    """Rows as read, and where they were read from."""

    rows: Dataset
    where: str


def listed(names: list[str]) -> str:
    """The names for a message: at most twelve, each cut to 40 characters."""
    return ", ".join(f"{name:.40}" for name in names[:12]) + (", ..." if len(names) > 12 else "")


def _own_names(table: Table, column: str) -> list[str]:
    feature = table.rows.features[column]
    return (
        [unicodedata.normalize("NFC", name.strip()) for name in feature.names]
        if isinstance(feature, ClassLabel)
        else []
    )


def _spell(table: Table, column: str) -> Iterator[tuple[int, Any, str | None]]:
    """Each row's number from 1, its label, and the class name of the label: `None` if it cannot be a name."""
    own = _own_names(table, column)
    for row, value in enumerate(table.rows[column], 1):
        name = None
        if isinstance(value, str):
            name = unicodedata.normalize("NFC", value.strip()) or None
        elif isinstance(value, int) and not isinstance(value, bool):
            name = own[value] if 0 <= value < len(own) else str(value)
        yield row, value, name


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", name) is not None


def _bad_label(where: str, column: str, value: object, expected: str) -> UserError:
    what = "is missing or null" if value is None else f"is {value!r:.60}"
    return UserError(f"{where}: {column!r} {what}, expected {expected}; fix or remove the row")


def _distinct(table: Table, column: str) -> list[str]:
    """The distinct labels, sorted; as numbers if all are numbers."""
    found: dict[str, str] = {}
    for row, value, name in _spell(table, column):
        where = f"{table.where} row {row}"
        if name is None:
            raise _bad_label(where, column, value, "a class name or a whole number")
        first = found.setdefault(name.casefold(), name)
        if name != first:
            raise _bad_label(where, column, value, f"{first!r} as in rows before (only the case differs)")
    numeric = all(map(_is_number, found.values()))
    return sorted(found.values(), key=lambda name: (int(name) if numeric else 0, name))


class Classes:
    """The names of the classes, and the class number of each label.

    Args:
        table: Training rows.
        column: The column of labels.
        given: The names, in order; `None` for a ClassLabel's names, or else the distinct labels of the rows.

    Raises:
        UserError: There are fewer than two classes, a name is given twice, or a label cannot be a name.
    """

    def __init__(self, table: Table, column: str, given: list[str] | None) -> None:
        own = _own_names(table, column)
        given = [unicodedata.normalize("NFC", name.strip()) for name in given or ()]
        names = given or own or _distinct(table, column)
        if len(set(names)) < len(names) or "" in names:
            raise UserError(f"labels: a class name is empty or given twice ({listed(names)})")
        if len(names) < 2:
            raise UserError(
                f"{table.where}: {column!r} has no class but {names[0]!r:.60}, and a classifier needs two; "
                "set labels, or another label_column"
            )
        self.names, self.column = names, column
        self._numbers = {name: number for number, name in enumerate(names)}
        if not any(map(_is_number, [*names, *own])):  # "1" would be a name in one row and the second class in another
            self._numbers |= {str(number): number for number in range(len(names))}
        # `given` renames a ClassLabel's classes. Not if the case alone differs: the order may be another.
        if len(own) == len(names) and not {name.casefold() for name in own} & {name.casefold() for name in names}:
            self._numbers |= {name: number for number, name in enumerate(own)}

    def numbers(self, table: Table) -> list[int]:
        """The class number of each row.

        Raises:
            UserError: A label is none of the classes; the row is named.
        """
        found = []
        for row, value, name in _spell(table, self.column):
            number = self._numbers.get(name) if name is not None else None
            if number is None:
                expected = f"one of {listed(self._accepted())}"
                for near in self.names:
                    if name is not None and near.casefold() == name.casefold():
                        expected = f"{near!r} (only the case differs) or another of {listed(self.names)}"
                shown = value if name in (None, str(value)) else name  # a ClassLabel's name rather than its number
                raise _bad_label(f"{table.where} row {row}", self.column, shown, expected)
            found.append(number)
        return found

    def _accepted(self) -> list[str]:
        """Each name, with its number if that is accepted too."""
        accepted = self._numbers.items()
        return [
            f"{name} ({at})" if (str(at), at) in accepted and name != str(at) else name
            for at, name in enumerate(self.names)
        ]
