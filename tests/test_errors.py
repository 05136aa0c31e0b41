"""What a program says when it stops is one line, whatever it quotes."""

from pathlib import Path

import pytest

from plainlora.errors import UserError, one_line_errors


def test_u23_no_letter_of_a_quoted_text_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised, one_line_errors():
        raise UserError("a template says \x1b[31mred\x07\n\tand \x9b2J, \u202egnp.txt, \udcff; größer 🦙")
    assert raised.value.code == 2
    assert capsys.readouterr().err == (
        "error: a template says \\x1b[31mred\\x07 and \\x9b2J, \\u202egnp.txt, \\udcff; größer 🦙\n"
    )


def test_u22_faults_that_were_found_together_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised, one_line_errors():
        raise UserError("one\ntwo", UserError("three"))
    assert raised.value.code == 2
    assert capsys.readouterr().err == "error: one two\nerror: three\n"


def test_a_name_that_is_too_long_for_a_file_is_said_in_one_line_and_another_fault_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as raised, one_line_errors():
        (tmp_path / ("x" * 300)).stat()
    assert raised.value.code == 2
    assert "File name too long" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), one_line_errors():
        (tmp_path / "missing").stat()


def test_ctrl_c_ends_a_command_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised, one_line_errors():
        raise KeyboardInterrupt
    assert raised.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
