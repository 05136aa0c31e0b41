"""A run goes on with what it began with, to the end it was given, and reports no figures of a part as its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROWS
from tests.recipes.conftest import RunSFT
from tests.refusals import snapshot, without_progress

Refused = Callable[..., str]


@pytest.fixture
def begun(run_sft: RunSFT) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6."""
    return run_sft("llama", "run", "--packing", "false")


@pytest.fixture
def refused(run_sft: RunSFT, capfd: pytest.CaptureFixture[str]) -> Refused:
    """`refused(run, "--flag", ...)`: goes on with a run, which is refused in one line and left as it is."""

    def go_on(run: Path, *flags: str) -> str:
        before = snapshot(run)
        capfd.readouterr()
        with pytest.raises(SystemExit) as raised:
            run_sft("llama", run.name, "--packing", "false", "--resume_from_checkpoint", "true", *flags)
        (line,) = without_progress(capfd.readouterr().err)
        assert raised.value.code == 2
        assert snapshot(run) == before
        return line

    return go_on


def test_u09_a_run_goes_on_with_its_own_settings_and_rows_only(begun: Path, refused: Refused, tmp_path: Path) -> None:
    for flag, then, now in (
        ("--seed", "42", "7"),
        ("--learning_rate", "0.005", "0.001"),
        ("--optim", "adamw_torch_fused", "sgd"),
        ("--lr_scheduler_type", "cosine", "linear"),
        ("--packing", "False", "True"),
        ("--neftune_noise_alpha", "None", "5.0"),
    ):
        said = refused(begun, "--max_steps", "9", flag, now.lower())
        assert said.endswith(
            f"checkpoint-6 was trained with {flag[2:]} {then}, now it is {now}; give the same settings, or start anew "
            "in another --output_dir"
        )
    assert "was trained with bf16 False, now it is True" in refused(begun, "--max_steps", "9", "--precision", "bf16")
    assert "with rows a step 2, now it is 4" in refused(
        begun, "--max_steps", "9", "--gradient_accumulation_steps", "2"
    )
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    assert "was trained on other rows" in refused(begun, "--max_steps", "9", "--dataset_name", str(other))


def test_what_means_the_same_is_no_other_setting(begun: Path, run_sft: RunSFT) -> None:
    flags = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--packing", "false"]
    flags += ["--max_train_rows", "1000", "--lr_scheduler_kwargs", "{}"]
    longer = run_sft("llama", "run", "--max_steps", "9", "--resume_from_checkpoint", "true", *flags)
    assert (longer / "checkpoint-9").is_dir()


def test_names_in_another_order_are_the_same_names(run_sft: RunSFT) -> None:
    flags = ["--packing", "false", "--lora_target_modules"]
    run_sft("llama", "run", *flags, "q_proj", "v_proj")
    longer = run_sft(
        "llama", "run", *flags, "v_proj", "q_proj", "--max_steps", "9", "--resume_from_checkpoint", "true"
    )
    assert (longer / "checkpoint-9").is_dir()


def test_a_checkpoint_past_the_end_is_refused(begun: Path, refused: Refused) -> None:
    said = refused(begun, "--max_steps", "2")
    assert "checkpoint-6 is at step 6 already, and the run ends at step 2; raise max_steps or" in said


def test_a_run_says_from_which_checkpoint_it_goes_on(
    begun: Path, run_sft: RunSFT, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "resuming" not in capfd.readouterr().out
    (begun / "checkpoint-6" / "optimizer.pt").unlink()
    run_sft("llama", "run", "--packing", "false", "--resume_from_checkpoint", "true")
    assert f"\nresuming from {begun}/checkpoint-3, after step 3 of 6\n" in capfd.readouterr().out


def test_a_finished_run_that_is_resumed_says_so_and_keeps_its_weights(
    begun: Path, run_sft: RunSFT, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = (begun / "adapter_model.safetensors").read_bytes()
    capfd.readouterr()
    run_sft("llama", "run", "--packing", "false", "--resume_from_checkpoint", "true")
    said = capfd.readouterr().out
    assert "checkpoint-6 is at the last step, 6: nothing is left to train" in said
    assert "resuming from" not in said
    assert (begun / "adapter_model.safetensors").read_bytes() == weights


def test_figures_of_a_part_are_not_reported_as_those_of_the_run(begun: Path, run_sft: RunSFT) -> None:
    whole = json.loads((begun / "all_results.json").read_text())
    shutil.rmtree(begun / "checkpoint-6")
    run_sft("llama", "run", "--packing", "false", "--resume_from_checkpoint", "true")
    resumed = json.loads((begun / "all_results.json").read_text())
    left_out = {"train_loss", "train_samples_per_second", "train_steps_per_second"}
    assert whole.keys() - resumed.keys() == left_out
    assert resumed["eval_loss_adapter"] == whole["eval_loss_adapter"]


def test_a_resumed_run_may_begin_to_sample(begun: Path, run_sft: RunSFT) -> None:
    """The checkpoint knows nothing of that callback."""
    shutil.rmtree(begun / "checkpoint-6")
    flags = ("--packing", "false", "--resume_from_checkpoint", "true")
    run_sft("llama", "run", *flags, "--sample_prompts", "Say 1.", "--sample_steps", "2", "--max_new_tokens", "2")
    assert (begun / "checkpoint-6").is_dir()
    assert "Say 1." in (begun / "samples.md").read_text()
