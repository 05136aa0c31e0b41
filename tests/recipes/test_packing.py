"""Packed rows do not see each other (U7): the collator, mask and positions are those of the real trainer."""

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.conftest import CONFIGS, make_model, random_ids

DOCUMENTS = [random_ids(1, length)[0].tolist() for length in (17, 9, 25)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_u07_a_packed_document_gets_the_logits_it_gets_alone(
    kind: str, attention: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(kind)
    model.set_attn_implementation(attention)
    rows = Dataset.from_dict({"input_ids": DOCUMENTS, "labels": DOCUMENTS})
    packed = pack_dataset(rows, seq_length=64, strategy="bfd")
    assert len(packed) == 1, "the three documents share one sequence"
    collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    batch = collator([packed[0]])
    assert "attention_mask" not in batch
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        contaminated = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    start = 0
    for length in packed[0]["seq_lengths"]:
        own = batch["input_ids"][:, start : start + length]
        with torch.no_grad():
            alone = model(input_ids=own, use_cache=False).logits[0]
        torch.testing.assert_close(together[start : start + length], alone, rtol=1e-5, atol=1e-5)
        if start:  # without positions the later documents would see the first: the check above can fail
            assert not torch.allclose(contaminated[start : start + length], alone, atol=1e-3)
        start += length
    first_labels = (batch["position_ids"][0] == 0).nonzero().flatten()
    assert (batch["labels"][0, first_labels] == -100).all(), "no document is predicted from the one before it"
