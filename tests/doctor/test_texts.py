"""Every fault that labelled texts can have is planted and found, and healthy texts have none."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from trl import ModelConfig, ScriptArguments

from plainlora.doctor.finding import Examination, Finding
from plainlora.doctor.texts import examine_texts
from plainlora.settings.arguments import ClassifyArguments, ClassifyConfig
from plainlora.settings.programs import Settings
from plainlora.tasks.rows import prepare_texts
from tests.conftest import BACKBONES, TEXTS


def examine(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    train: list[Any],
    test: list[Any],
    max_length: int = 64,
    **settings: Any,
) -> Examination:
    for name, rows in (("train", train), ("test", test)):
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    training = ClassifyConfig(
        output_dir=str(folder / "out"), use_cpu=True, report_to="none",
        eval_strategy=settings.pop("eval_strategy", "no"),
    )  # fmt: skip
    script = ScriptArguments(dataset_name=str(folder))
    settings_of_run = Settings(ClassifyArguments(**settings), script, training, ModelConfig())
    texts = prepare_texts(settings_of_run, tokenizer, max_length, lambda _: None)
    return examine_texts(texts, tokenizer, BACKBONES["bert"]())


def found(examination: Examination, check: str, subject: str = "train rows") -> Finding:
    """The one finding of a check."""
    (finding,) = [one for one in examination.findings if (one.check, one.subject) == (check, subject)]
    return finding


def test_healthy_texts_have_no_warning_and_no_error(word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    examination = examine(tmp_path, word_tokenizer, TEXTS[:90], TEXTS[90:])
    assert {finding.level for finding in examination.findings} == {"ok"}
    assert len(examination.findings) == 10
    classes = found(examination, "classes")
    assert classes.figures["counts"] == {"ham": 60, "spam": 30}
    assert "always 'ham' would be right for 66.7%" in classes.message


@pytest.mark.parametrize(("max_length", "level"), [(64, "ok"), (11, "note"), (5, "warning")])
def test_u05_cut_texts_are_counted_and_mostly_cut_ones_a_warning(
    word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, max_length: int, level: str
) -> None:
    finding = found(examine(tmp_path, word_tokenizer, TEXTS[:90], TEXTS[90:], max_length), "truncated")
    assert finding.level == level
    assert (finding.figures["cut"] > 0) == (level != "ok")


@pytest.mark.parametrize(("alone", "level"), [(12, "error"), (8, "warning"), (3, None)])
def test_classes_of_one_row_each_are_texts_or_numbers(
    word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, alone: int, level: str | None
) -> None:
    numbers = [*range(12), *(number for number in range(alone, 12))]
    rows = [{"text": f"good film {number}", "label": f"{number / 7:.3f}"} for number in numbers]
    examination = examine(tmp_path, word_tokenizer, rows, rows)
    single = [one for one in examination.findings if one.check == "single"]
    assert [one.level for one in single] == ([] if level is None else [level])
    assert all(one.figures == {"classes": 12, "single": alone} for one in single)


def test_many_classes_are_not_all_listed(word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": f"good film {number}", "label": f"c{number}"} for number in range(40)]
    assert ", ...; always" in found(examine(tmp_path, word_tokenizer, rows, rows), "classes").message


def test_leaked_contradicting_and_empty_texts(word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    train = [*TEXTS[:30], {"text": f" {TEXTS[0]['text']}", "label": "ham"}, {"text": " ", "label": "ham"}]
    examination = examine(tmp_path, word_tokenizer, train, [*TEXTS[90:], TEXTS[5]])
    leaked = found(examination, "leaked", "test rows")
    assert (leaked.level, leaked.figures["leaked"]) == ("warning", 1)
    contradicting = found(examination, "contradicting")
    assert (contradicting.level, contradicting.figures["contradicting"]) == ("warning", 2)
    assert found(examination, "empty", "all rows").level == "note"


def test_a_rare_class_is_noted(word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    ham = [row for row in TEXTS if row["label"] == "ham"]
    finding = found(examine(tmp_path, word_tokenizer, [*ham, TEXTS[0]], TEXTS[:9]), "classes")
    assert finding.level == "note"
    assert "look at F1 beside accuracy, or set balance_classes" in finding.message


def test_validation_rows_that_are_needed_and_not_there(
    word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    examination = examine(tmp_path, word_tokenizer, TEXTS[:90], TEXTS[90:], eval_strategy="epoch")
    finding = found(examination, "missing", "validation rows")
    assert finding.level == "error"
    assert "eval_strategy needs validation rows" in finding.message
