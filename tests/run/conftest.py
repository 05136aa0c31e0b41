"""A checkpoint as training writes one, and a run that holds three."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerState

from plainlora import inject, save_adapter
from tests.conftest import make_model


def write_state(checkpoint: Path, changes: dict[str, object]) -> None:
    state = asdict(TrainerState(train_batch_size=2, log_history=[{"loss": 1.5, "step": 1}]))
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | changes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Trainer writes at a step: adapter, optimizer, schedule, state."""
    folder = tmp_path_factory.mktemp("whole")
    model = inject(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, folder)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict(), folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    return folder


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Path:
    for step in (9, 10, 100):
        shutil.copytree(checkpoint, tmp_path / f"checkpoint-{step}")
        write_state(tmp_path / f"checkpoint-{step}", {"global_step": step})
    return tmp_path
