"""EVA's initial values are plain PEFT's, from the batches that it can use."""

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict, initialize_lora_eva_weights
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from plainlora.lora.errors import LoRAError
from plainlora.peft_model.model import attach
from tests.conftest import BACKBONES

Batch = dict[str, torch.Tensor]
R = 4


def a_classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BACKBONES["distilbert"]()).eval()


def config(tau: float = 0.99) -> LoraConfig:
    eva = EvaConfig(tau=tau)
    return LoraConfig(
        task_type="SEQ_CLS", r=R, target_modules=["q_lin", "v_lin"], init_lora_weights="eva", eva_config=eva
    )


def batches_of(*lengths: int) -> list[Batch]:
    """Two reviews each, with the label of each review."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in lengths:
        ids = torch.randint(2, 320, (2, length), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])})
    return found


def by_plain_peft(batches: list[Batch]) -> nn.Module:
    model = get_peft_model(a_classifier(), config())
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Their A matrices; the new head is drawn at random."""
    own, expected = (
        {name: value for name, value in get_peft_model_state_dict(model).items() if "lora_A" in name}
        for model in (ours, theirs)
    )
    assert own.keys() == expected.keys()
    assert len(own) == 4
    for name, value in own.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_labels_of_whole_rows_are_not_taken_for_those_of_tokens() -> None:
    batches = batches_of(24, 24, 24)
    alone = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    assert_same(attach(a_classifier(), config(), batches=batches), by_plain_peft(alone))


def test_a_batch_of_too_few_tokens_is_passed_over_without_peft_printing_it(capsys: pytest.CaptureFixture[str]) -> None:
    batches = batches_of(24, 1, 24, 24)  # rho is 2, so 8 components
    long = [{"input_ids": each["input_ids"], "attention_mask": each["attention_mask"]} for each in batches]
    ours = attach(a_classifier(), config(), batches=batches)
    assert capsys.readouterr().out == ""
    assert_same(ours, by_plain_peft([long[0], *long[2:]]))


def test_where_every_batch_has_too_few_tokens_the_run_is_refused() -> None:
    with pytest.raises(LoRAError, match=r"8 components .* no batch of training rows has more than 6 trained tokens"):
        attach(a_classifier(), config(), batches=batches_of(3, 2))


def test_without_rows_it_is_refused() -> None:
    with pytest.raises(LoRAError, match="computes the adapter from training rows"):
        attach(a_classifier(), config())


def test_what_does_not_converge_is_refused_where_plain_peft_has_no_end() -> None:
    with pytest.raises(LoRAError, match="has not converged in 512 batches"):
        attach(a_classifier(), config(tau=1.0), batches=batches_of(24, 24))
