"""Packed rows do not see each other (U7): rows, collator, mask, positions and loss are those of the real trainer."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.training.trainers import AdapterTrainer, args_for_sft
from tests.conftest import CONFIGS, make_model, random_ids

DOCUMENTS = [random_ids(1, length)[0].tolist() for length in (17, 9, 25)]


def packing_trainer(
    kind: str, attention: str, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> tuple[AdapterTrainer, dict[str, Any]]:
    """A trainer over one packed sequence of all documents, and its only batch."""
    model = make_model(kind)
    model.set_attn_implementation(attention)
    backend = BACKENDS["reference"]
    attach_adapter(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"), backend)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    args = SFTConfig(
        output_dir=str(folder), packing=True, max_length=64, per_device_train_batch_size=1, use_cpu=True, bf16=False,
        report_to="none", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": DOCUMENTS, "labels": DOCUMENTS})
    trainer = AdapterTrainer(model, backend, args=args_for_sft(args), train_dataset=rows, processing_class=tokenizer)
    (batch,) = list(trainer.get_train_dataloader())
    model.eval()
    return trainer, batch


def documents_in(batch: dict[str, Any]) -> list[torch.Tensor]:
    """The documents in the order in which they were packed."""
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    documents = [batch["input_ids"][:, a:b] for a, b in pairwise(starts)]
    assert sorted(document[0].tolist() for document in documents) == sorted(DOCUMENTS)
    return documents


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_u07_a_packed_document_gets_the_logits_it_gets_alone(
    kind: str, attention: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer, batch = packing_trainer(kind, attention, tokenizer, tmp_path)
    model = trainer.adapted
    assert "attention_mask" not in batch
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        contaminated = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    start = 0
    for own in documents_in(batch):
        length = own.shape[1]
        with torch.no_grad():
            alone = model(input_ids=own, use_cache=False).logits[0]
        torch.testing.assert_close(together[start : start + length], alone, rtol=1e-5, atol=1e-5)
        if start:  # without positions the later documents would see the first: the check above can fail
            assert not torch.allclose(contaminated[start : start + length], alone, atol=1e-3)
        start += length
    first_labels = (batch["position_ids"][0] == 0).nonzero().flatten()
    assert (batch["labels"][0, first_labels] == -100).all(), "no document is predicted from the one before it"


@pytest.mark.parametrize("kind", CONFIGS)
def test_u07_the_loss_of_a_packed_batch_is_the_sum_of_its_documents_losses(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer, batch = packing_trainer(kind, "sdpa", tokenizer, tmp_path)
    one = torch.tensor(1)  # a loss over one item is a sum over tokens
    documents = documents_in(batch)
    with torch.no_grad():
        together = trainer.compute_loss(trainer.adapted, dict(batch), num_items_in_batch=one)
        alone = [
            torch.nn.functional.cross_entropy(
                trainer.adapted(input_ids=own, use_cache=False).logits[0, :-1], own[0, 1:], reduction="sum"
            )
            for own in documents
        ]
        ignorant = {name: value for name, value in batch.items() if name != "position_ids"}
        contaminated = trainer.compute_loss(trainer.adapted, ignorant, num_items_in_batch=one)
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(contaminated, together, rtol=1e-4), "the check above could not fail"
