"""A run of a few optimizer steps is said, unless it was asked for."""

from pathlib import Path

from plainlora.doctor.finding import Examination
from plainlora.doctor.steps import FEW, examine_steps
from plainlora.settings.arguments import SFTRecipeConfig


def warned(folder: Path, steps: int, **given: object) -> list[str]:
    examination = Examination()
    training = SFTRecipeConfig(output_dir=str(folder), use_cpu=True, bf16=False, **given)  # type: ignore[arg-type]
    examine_steps(steps, training, examination)
    assert all(finding.level == "warning" for finding in examination.findings)
    return [finding.message for finding in examination.findings]


def test_few_steps_are_a_warning_that_says_what_to_set(tmp_path: Path) -> None:
    (message,) = warned(tmp_path, 2, num_train_epochs=1, packing=True)
    assert message.startswith("2 optimizer steps in all: ")
    assert message.endswith(
        "set num_train_epochs to 11 or more, or packing to false, because it makes a few long rows out of many"
    )
    (message,) = warned(tmp_path, 1, num_train_epochs=1)
    assert message.endswith(
        "1 optimizer step in all: the adapter will learn little; set num_train_epochs to 21 or more"
    )


def test_enough_steps_and_those_asked_for_are_none(tmp_path: Path) -> None:
    assert not warned(tmp_path, FEW)
    assert not warned(tmp_path, 2, max_steps=2)
