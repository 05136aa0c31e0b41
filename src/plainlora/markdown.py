"""Tables in Markdown."""

from collections.abc import Collection, Iterable, Sequence


def table(header: Sequence[object], rows: Iterable[Sequence[object]], right: Collection[int] = ()) -> str:
    """A table of GitHub's Markdown: https://github.github.com/gfm/#tables-extension-.

    Args:
        header: The columns' titles.
        rows: The cells of each row, as many as there are titles.
        right: Numbers of the right-aligned columns, from 0.
    """
    rule = ("---:" if number in right else "---" for number in range(len(header)))
    return "\n".join([_line(header), f"|{'|'.join(rule)}|", *map(_line, rows)])


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"
