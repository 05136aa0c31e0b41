"""A run that does not fit is found before it starts."""

from dataclasses import replace
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import ModelConfig

from plainlora.backends import BACKENDS
from plainlora.doctor.finding import Examination
from plainlora.doctor.resources import examine_resources
from plainlora.resources.footprint import Footprint, estimate
from plainlora.resources.plan import Plan
from plainlora.settings.arguments import SFTRecipeConfig
from tests.conftest import CONFIGS


@pytest.fixture(scope="module")
def footprint(tmp_path_factory: pytest.TempPathFactory) -> Footprint:
    """Of a run that fits anywhere."""
    training = SFTRecipeConfig(
        output_dir=str(tmp_path_factory.mktemp("run")), use_cpu=True, bf16=False, report_to="none",
        per_device_train_batch_size=2, gradient_checkpointing=False,
    )  # fmt: skip
    lora = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    run = {"longest": 32, "rows": 8, "tokens": 256, "backend": BACKENDS["fused"]}
    return estimate(Plan(CONFIGS["llama"](), lora, training, ModelConfig(), **run))


def levels(footprint: Footprint) -> dict[str, str]:
    examination = Examination()
    examine_resources(footprint, examination)
    return {finding.check: finding.level for finding in examination.findings}


def with_free(footprint: Footprint, free: int) -> Footprint:
    memory, needed = footprint.memory, footprint.memory.needed
    assert needed is not None
    return replace(footprint, memory=replace(memory, free=free, fits=needed <= free))


def test_what_fits_is_said_to_fit_and_what_does_not_is_an_error(footprint: Footprint) -> None:
    needed, margin = footprint.memory.needed, footprint.memory.margin
    assert needed is not None
    assert margin is not None
    assert levels(footprint) == {"memory": "ok", "disk": "ok"}
    for free, level in (
        (needed, "ok"),
        (needed - 1, "warning"),
        (needed - margin, "warning"),
        (needed - margin - 1, "error"),
    ):
        assert levels(with_free(footprint, free))["memory"] == level
    unknown = replace(footprint.memory, needed=None, peak=None, fits=None)
    assert levels(replace(footprint, memory=unknown))["memory"] == "note"
    assert levels(replace(footprint, memory=replace(unknown, at_least=2, free=1, fits=False)))["memory"] == "error"
    assert levels(replace(footprint, disk=replace(footprint.disk, fits=False)))["disk"] == "error"


def test_memory_that_is_needed_is_told_where_the_free_one_is_not_known(footprint: Footprint) -> None:
    examination = Examination()
    examine_resources(replace(footprint, memory=replace(footprint.memory, free=None, fits=None)), examination)
    assert examination.findings[0].message.endswith("GB needed; how much is free on cpu is not known")


def test_without_rows_to_evaluate_no_evaluation_is_counted_and_with_longer_ones_theirs(tmp_path: Path) -> None:
    training = SFTRecipeConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=1,
        per_device_eval_batch_size=8, gradient_checkpointing=False,
    )  # fmt: skip
    lora = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    run = {"longest": 32, "rows": 8, "tokens": 256, "backend": BACKENDS["fused"]}
    found = [
        estimate(Plan(CONFIGS["llama"](), lora, training, ModelConfig(), **run, **options)).memory
        for options in ({"evaluated": 0}, {"evaluated": 8}, {"evaluated": 8, "longest_evaluated": 128})
    ]
    assert found[0].evaluation == 0 < found[1].evaluation < found[2].evaluation
    assert found[0].needed <= found[1].needed < found[2].needed


def test_what_to_do_is_said(footprint: Footprint) -> None:
    examination = Examination()
    examine_resources(replace(with_free(footprint, 1), disk=replace(footprint.disk, fits=False)), examination)
    memory, disk = (finding.message for finding in examination.findings)
    assert memory.endswith("lower per_device_train_batch_size or max_length, or set gradient_checkpointing")
    assert disk.endswith("set save_total_limit, or another output_dir")
