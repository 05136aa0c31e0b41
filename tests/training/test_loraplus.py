"""LoRA+ is PEFT's: the groups and the trajectory of its own factory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from trl import SFTConfig, SFTTrainer

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.errors import UserError
from plainlora.parity.tiny import byte_tokenizer
from plainlora.training.trainers import AdapterTrainer, args_for_sft
from tests.conftest import make_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def rows() -> Dataset:
    ids = torch.randint(2, 320, (8, 12), generator=torch.Generator().manual_seed(4)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(folder: Path, **options: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder), max_steps=4, learning_rate=1e-3, per_device_train_batch_size=2, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, max_length=None,
        gradient_checkpointing=False, weight_decay=0.1, **options,
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_trajectory_is_that_of_pefts_factory(backend: str, use_dora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    theirs = get_peft_model(make_model("llama"), config)
    options = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1}
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, **options, eps=1e-8, betas=(0.9, 0.999))
    plain = SFTTrainer(
        theirs,
        args=arguments(tmp_path / "plain"),
        train_dataset=rows(),
        processing_class=byte_tokenizer(),
        optimizers=(optimizer, None),
    )
    expected = losses(plain)

    config = LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = attach_adapter(make_model("llama"), config, BACKENDS[backend])
    made: dict[float | None, list[float]] = {}
    for ratio in (16.0, None):
        torch.manual_seed(1)
        model = attach_adapter(make_model("llama"), config, BACKENDS[backend])
        trainer = AdapterTrainer(
            model, BACKENDS[backend], args=args_for_sft(arguments(tmp_path / f"{ratio}")), train_dataset=rows(),
            processing_class=byte_tokenizer(), loraplus_lr_ratio=ratio,
        )  # fmt: skip
        made[ratio] = losses(trainer)
        rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
        assert rates == ({1e-3, 16e-3} if ratio else {1e-3})
        trained = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
        assert trained == sum(parameter.requires_grad for parameter in model.parameters())
    assert made[16.0] == pytest.approx(expected, rel=1e-6)
    assert made[None] != pytest.approx(expected, rel=1e-6)


def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path: Path) -> None:
    model = attach_adapter(make_model("llama"), LoraConfig(target_modules="all-linear"), BACKENDS["fused"])
    trainer = AdapterTrainer(
        model, BACKENDS["fused"], args=args_for_sft(arguments(tmp_path)), train_dataset=rows(),
        processing_class=byte_tokenizer(), loraplus_lr_ratio=4.0,
    )  # fmt: skip
    trainer.get_optimizer_cls_and_kwargs = lambda *_: (torch.optim.AdamW, {"params": []})  # as GaLore's
    with pytest.raises(UserError, match=r"loraplus_lr_ratio: optim .* makes its own groups"):
        trainer.create_optimizer()
