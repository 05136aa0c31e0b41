"""Checkpoints and the final save: which are kept, what they hold, and that none is begun without room for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from plainlora.errors import UserError
from plainlora.folders import find_damage
from plainlora.run.checkpoints import find_problem
from plainlora.run.folder import UNFINISHED, list_checkpoints
from plainlora.settings.arguments import ClassifyConfig
from plainlora.training.trainers import ClassifierTrainer
from tests.conftest import BACKBONES


def make_trainer(folder: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> ClassifierTrainer:
    """Every weight of a tiny classifier is trained for four steps, and saved after each."""
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7 + number] for number in range(8)], "labels": [0, 1] * 4})
    arguments: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "save_steps": 1,
        "disable_tqdm": True, "learning_rate": 1e-3,
    }  # fmt: skip
    torch.manual_seed(0)
    return ClassifierTrainer(
        AutoModelForSequenceClassification.from_config(BACKBONES["bert"]()),
        None,
        args=ClassifyConfig(output_dir=str(folder), **(arguments | options)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_u10_every_save_is_whole_and_says_what_it_holds(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = make_trainer(tmp_path, word_tokenizer)
    trainer.train()
    trainer.save_model()
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    for folder in (tmp_path, *list_checkpoints(tmp_path)):
        assert (folder / "manifest.json").is_file()
        assert find_damage(folder) is None
        assert (folder / "model.safetensors").is_file()
    assert not any(find_problem(checkpoint) for checkpoint in list_checkpoints(tmp_path))
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_u23_no_pickle_of_the_arguments_is_written(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make_trainer(tmp_path, word_tokenizer, hub_token="hf_secret")
    trainer.train()
    trainer.save_model()
    assert not list(tmp_path.rglob("training_args.bin"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [1, 2, 3, 4]), (0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])]
)
def test_the_newest_checkpoints_are_kept(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, limit: int | None, kept: list[int]
) -> None:
    make_trainer(tmp_path, word_tokenizer, save_total_limit=limit).train()
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


@pytest.mark.parametrize(("limit", "kept"), [(1, ["checkpoint-1"]), (2, ["checkpoint-1", "checkpoint-4"])])
def test_the_best_checkpoint_is_kept_and_named_where_it_is(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, limit: int, kept: list[str]
) -> None:
    """At this rate the first step is the best."""
    trainer = make_trainer(
        tmp_path, word_tokenizer, save_total_limit=limit, eval_strategy="steps", eval_steps=1, learning_rate=1.0,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert names(tmp_path) == kept


def test_u10_a_stale_checkpoint_of_a_later_step_does_not_push_the_new_one_out(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    """It may be the broken one that was passed over."""
    (tmp_path / "checkpoint-9").mkdir()
    make_trainer(tmp_path, word_tokenizer, save_total_limit=1).train()
    assert names(tmp_path) == ["checkpoint-4"]


def test_u10_what_a_kill_left_of_a_save_is_cleared_away(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    left = tmp_path / UNFINISHED / "checkpoint-1"
    left.mkdir(parents=True)
    (left / "pytorch_model.bin").write_bytes(b"half")
    make_trainer(tmp_path, word_tokenizer, max_steps=1).train()
    assert not (tmp_path / "checkpoint-1" / "pytorch_model.bin").exists()
    assert find_problem(tmp_path / "checkpoint-1") is None
    assert not (tmp_path / UNFINISHED).exists()


def test_u10_a_save_without_room_for_it_is_refused_before_anything_is_written(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The weights would take four petabytes; in memory all of them are one number."""
    trainer = make_trainer(tmp_path / "run", word_tokenizer, save_steps=2)
    trainer.train()
    huge = nn.Parameter(torch.zeros(1).expand(10**15), requires_grad=False)
    trainer.adapted.register_parameter("huge", huge)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(
        UserError,
        match=r"^the final save in .*run needs 4,000,000\.\d\d GB, but the disk of .*run has .* GB free; make",
    ):
        trainer.save_model()
    with pytest.raises(UserError, match=r"checkpoint-4 needs 4,000,000\.\d\d GB"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert sorted(path for path in tmp_path.rglob("*")) == before
