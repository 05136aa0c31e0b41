"""The order in which a classifier's rows are drawn, and what a trainer does with the devices of its host."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

from plainlora.settings.arguments import ClassifyConfig
from plainlora.training.trainers import ClassifierTrainer, args_for_trainer
from tests.conftest import BACKBONES
from tests.gpu_host import gpu_host


def make_trainer(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> ClassifierTrainer:
    lengths = [1 + 13 * number % 29 for number in range(64)]
    rows = Dataset.from_dict({"input_ids": [[5] * length for length in lengths], "labels": [0, 1] * 32})
    torch.manual_seed(0)
    return ClassifierTrainer(
        AutoModelForSequenceClassification.from_config(BACKBONES["bert"]()),
        None,
        args=ClassifyConfig(output_dir=str(folder), use_cpu=True, seed=seed, per_device_train_batch_size=4),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def order(trainer: ClassifierTrainer, epoch: float, stream: int) -> list[int]:
    """The rows' order in an epoch, whatever state PyTorch's global stream is in."""
    torch.manual_seed(stream)
    trainer.state.epoch = epoch
    sampler = trainer._get_train_sampler()
    assert sampler is not None
    return list(sampler)


def test_every_process_and_every_resumed_run_draws_the_same_order(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    one, other = make_trainer(tmp_path, word_tokenizer), make_trainer(tmp_path, word_tokenizer)
    for epoch in (0.0, 1.0, 2.0):
        expected = order(one, epoch, stream=1)
        assert sorted(expected) == list(range(64))
        assert order(other, epoch, stream=2) == expected
        assert order(other, epoch + 0.5, stream=3) == expected  # resumed in the middle
    assert order(one, 0.0, 1) != order(one, 1.0, 1)
    assert order(one, 0.0, 1) != order(make_trainer(tmp_path, word_tokenizer, seed=1), 0.0, 1)


def test_one_process_trains_on_one_gpu_whatever_the_host_has(tmp_path: Path) -> None:
    with gpu_host(count=4):
        told = ClassifyConfig(output_dir=str(tmp_path), per_device_train_batch_size=4)
        assert (told.n_gpu, told.train_batch_size) == (4, 16)  # what Trainer would do with it
        handed = args_for_trainer(told)
    assert (handed.n_gpu, handed.train_batch_size, handed.eval_batch_size) == (1, 4, 8)
    assert handed.device == torch.device("cuda:0")


@pytest.mark.parametrize(("typed", "expected"), [(None, False), (True, True), (False, False)])
def test_unused_weights_are_looked_for_only_if_asked(typed: bool | None, expected: bool, tmp_path: Path) -> None:
    told = ClassifyConfig(output_dir=str(tmp_path), use_cpu=True, ddp_find_unused_parameters=typed)
    assert args_for_trainer(told).ddp_find_unused_parameters is expected


def test_what_is_trained_under_loss_scaling_is_float32(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    """GradScaler refuses gradients in fp16, which a head that is trained whole would have."""
    model = AutoModelForSequenceClassification.from_config(BACKBONES["bert"](), dtype=torch.float16)
    model.base_model.requires_grad_(False)
    args = ClassifyConfig(output_dir=str(tmp_path), use_cpu=True)
    args.fp16 = True  # as on a GPU; Accelerate refuses it on a CPU
    rows = Dataset.from_dict({"input_ids": [[5]], "labels": [0]})
    collator = DataCollatorWithPadding(word_tokenizer)
    ClassifierTrainer(model, None, args=args, train_dataset=rows, data_collator=collator)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith("classifier") else torch.float16), name
