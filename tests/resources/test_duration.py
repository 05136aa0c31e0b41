"""Operations are counted as the products of matrices have them."""

import copy

import torch
from transformers import PreTrainedModel

from plainlora.backends import BACKENDS, attach_adapter, count_parameters
from plainlora.resources.duration import count_flops, measure_flops
from tests.conftest import VOCABULARY, make_model
from tests.resources.plans import LORA

CPU = torch.device("cpu")


def test_the_operations_are_two_a_weight_and_token_in_each_pass() -> None:
    model = attach_adapter(make_model("llama"), copy.deepcopy(LORA), BACKENDS["reference"])
    assert isinstance(model, PreTrainedModel)
    head = VOCABULARY * 64
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    adapter, _ = count_parameters(model)
    tokens, trained = 1000, 100
    frozen = 4 * (linear * tokens + head * trained) + 6 * adapter * tokens
    assert count_flops(model, tokens, trained, checkpointing=False, frozen=True) == frozen
    again = frozen + 2 * (linear + adapter) * tokens
    assert count_flops(model, tokens, trained, checkpointing=True, frozen=True) == again
    assert measure_flops(CPU, torch.float32) > 1e8
