"""Tables in Markdown."""

from plainlora.markdown import table


def test_a_cell_stays_one_cell_whatever_it_holds() -> None:
    assert table(["module", "r"], [["q_proj|v_proj", 8], ["", None]], right=[1]).splitlines() == [
        "| module | r |", "|---|---:|", r"| q_proj\|v_proj | 8 |", "|  | None |",
    ]  # fmt: skip
