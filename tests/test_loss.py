"""The one-pass head beside TRL's own, and beside the equation in fp64."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from plainlora.loss import CHUNK, TokenLogProbs
from plainlora.loss_head import LossHead
from tests.conftest import CONFIGS, make_model, random_ids

FIELDS = ("log_probs", "entropy", "is_top1")


def make(kind: str, one_pass: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = make_model(kind, dtype).requires_grad_(False)
    add_fused_lm_head(model, outputs=FIELDS)
    if one_pass:
        LossHead(model)
    return model


def batch() -> dict[str, torch.Tensor]:
    """More tokens than one chunk, a masked prompt, and a row without any label."""
    ids = random_ids(9, 24)
    labels = ids.clone()
    labels[0, :7] = -100
    labels[2] = -100
    assert (labels[:, 1:] != -100).sum() > CHUNK
    return {"input_ids": ids, "labels": labels}


def run(model: PreTrainedModel, **inputs: Any) -> tuple[FusedCausalLMOutput, torch.Tensor]:
    """The output, and the gradient that arrives at the input embeddings."""
    seen: list[torch.Tensor] = []

    def watch(_: nn.Module, __: object, output: torch.Tensor) -> None:
        output.requires_grad_(True).retain_grad()
        seen.append(output)

    handle = model.get_input_embeddings().register_forward_hook(watch)
    output = model(**inputs, fused_lm_head=True)
    output.loss.backward()
    handle.remove()
    return output, seen[0].grad


@pytest.mark.parametrize("items", [None, 25])
@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_statistics_and_gradient_are_those_of_trls_head(kind: str, items: int | None) -> None:
    given = batch() | ({} if items is None else {"num_items_in_batch": torch.tensor(items)})
    (theirs, their_gradient), (ours, our_gradient) = (run(make(kind, one_pass), **given) for one_pass in (False, True))
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.is_top1, theirs.is_top1.bool())
    assert torch.equal(ours.label_mask, theirs.label_mask)
    scale = their_gradient.abs().max()
    assert float((our_gradient - their_gradient).abs().max() / scale) < 2e-6


@pytest.mark.parametrize("with_bias", [False, True])
def test_against_the_equation_in_fp64(with_bias: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 16, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(50, 16, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    labels = torch.randint(50, (300,))
    upstream = torch.randn(300, dtype=torch.float64)  # another weight for each token, as in DFT
    given = bias if with_bias else None
    expected = functional.linear(hidden, weight, given).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    statistics = torch.zeros(2, 300, dtype=torch.float64)
    found = TokenLogProbs.apply(hidden, labels, weight, given, statistics)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    logits = functional.linear(hidden, weight, given).detach()
    torch.testing.assert_close(statistics[0], torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(statistics[1].bool(), logits.argmax(-1) == labels)


def test_no_logits_are_kept_for_the_way_back() -> None:
    hidden = torch.randn(512, 16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        TokenLogProbs.apply(hidden, torch.zeros(512, dtype=torch.long), torch.randn(5000, 16), None, None)
    assert [tuple(tensor.shape) for tensor in kept] == [(512, 16)]


def test_a_batch_without_a_label_is_a_finite_zero() -> None:
    given = batch()
    given["labels"][:] = -100
    output, gradient = run(make("llama", True), **given)
    assert output.loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_without_statistics_the_loss_is_the_same_and_they_are_zero() -> None:
    model = make_model("llama").requires_grad_(False)
    add_fused_lm_head(model, outputs=FIELDS)
    head = LossHead(model)
    first, _ = run(model, **batch())
    head.with_statistics = False
    second, _ = run(model, **batch())
    assert torch.equal(first.log_probs, second.log_probs)
    assert first.entropy.abs().sum() > 0 == second.entropy.abs().sum()


def test_without_the_fused_call_the_model_gives_its_logits() -> None:
    model, plain = make("qwen2", True), make_model("qwen2")
    ids = random_ids()
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert model(**batch()).loss.item() == pytest.approx(plain(**batch()).loss.item())
    assert torch.equal(
        model.generate(ids, max_new_tokens=3, do_sample=False), plain.generate(ids, max_new_tokens=3, do_sample=False)
    )
