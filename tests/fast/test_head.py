"""The one-pass head beside TRL's own, and beside the equation in fp64."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from plainlora.fast import head as loss
from plainlora.fast.head import CHUNK, LabelledTokens, TokenLogProbs, chunk_size, gradient_dtype
from plainlora.fast.loss_head import Form, LossHead
from tests.conftest import CONFIGS, make_model, random_ids
from tests.fake_gpu import fake_gpu

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


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_answers_to_prompts_of_different_lengths_are_the_models_own(kind: str) -> None:
    """`generate` counts a row's positions from its padding only if the model's signature names them."""
    model, plain = make(kind, True), make_model(kind)
    ids = random_ids(2, 8)
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0] * 5 + [1] * 3, [1] * 8])}
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (each.generate(**padded, **options) for each in (model, plain))
    assert torch.equal(found.sequences, expected.sequences)
    for ours, own in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, own)
    assert model._supports_logits_to_keep() == plain._supports_logits_to_keep()


class Operations(TorchDispatchMode):
    """Names of the operations that run inside, with the dtypes of the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(result, torch.Tensor):
            self.made.append((str(func), result.dtype))
        return result


def by_mask(states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same tokens by boolean indexing: their states, their labels, and values of theirs spread again."""
    mask = labels[:, 1:] != -100
    chosen = states[:, :-1][mask]
    values = chosen.sum(-1)
    return chosen, labels[:, 1:][mask], values.new_zeros(mask.shape).masked_scatter(mask, values)


def by_index(states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = LabelledTokens.find(labels)
    chosen = tokens.select(states)
    return chosen, tokens.labels, tokens.spread(chosen.sum(-1))


@pytest.mark.parametrize("shape", [(9, 24), (1, 5), (3, 1)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_tokens_are_selected_and_spread_as_by_boolean_indexing(shape: tuple[int, int], share: float) -> None:
    labels = torch.where(torch.rand(shape) < share, torch.randint(50, shape), -100)
    states = torch.randn(*shape, 16, requires_grad=True)
    upstream = torch.randn(shape[0], shape[1] - 1)
    found = []
    for form in (by_mask, by_index):
        *chosen, spread = form(states, labels)
        found.append([*chosen, spread, torch.autograd.grad((spread * upstream).sum(), states)[0]])
    for expected, ours in zip(*found, strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("form", ["one pass", "own"])
def test_a_step_of_the_head_looks_for_the_labelled_tokens_once(form: Form) -> None:
    """On a GPU the host waits for what it needs a number of: `nonzero`, and whatever indexes by booleans."""
    model = make_model("llama")
    given = batch()
    head = LossHead(model, form)
    head.with_statistics = False
    found = []
    for labels in ({}, {"labels": given["labels"], "fused_lm_head": True}):
        with Operations() as operations:
            output = model(input_ids=given["input_ids"], use_cache=False, **labels)
            (output.loss if labels else output.logits.sum()).backward()
        waits = ("nonzero", "masked_select", "local_scalar_dense", "index.Tensor", "index_put")
        found.append(Counter(name for name in operations.names if any(wait in name for wait in waits)))
    assert found[1] - found[0] == Counter({"aten.nonzero.default": 1})


def test_a_backward_pass_inside_autocast_gives_the_same_gradients() -> None:
    hidden = torch.randn(300, 16, requires_grad=True)
    weight, labels = torch.randn(50, 16), torch.randint(50, (300,))
    found = []
    for inside in (False, True):
        log_probs = TokenLogProbs.apply(hidden, labels, weight, None, None)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found += torch.autograd.grad(log_probs, hidden, torch.linspace(-1, 1, 300))
    assert torch.equal(*found)


def test_gradients_are_kept_in_fp32_at_least_on_a_gpu_and_as_they_come_on_a_cpu() -> None:
    half = (torch.float16, torch.bfloat16)
    assert {gradient_dtype("cuda", dtype) for dtype in (*half, torch.float32)} == {torch.float32}
    assert gradient_dtype("cuda", torch.float64) == torch.float64
    assert [gradient_dtype("cpu", dtype) for dtype in half] == list(half)


def test_in_fp16_a_gradient_of_the_loss_above_its_largest_number_does_not_overflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loss scale of 2^20 over eight tokens, as a gradient scaler grows it."""
    hidden = (torch.randn(8, 16) / 4).half().requires_grad_()
    weight, labels = torch.randn(50, 16).half() / 64, torch.randint(50, (8,))
    upstream = torch.full((8,), 2.0**20 / 8)
    assert float(upstream[0]) > torch.finfo(torch.float16).max
    exact = hidden.detach().double().requires_grad_()
    expected = (exact @ weight.double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    found = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(loss, "gradient_dtype", lambda _, dtype, device=device: gradient_dtype(device, dtype))
        log_probs = TokenLogProbs.apply(hidden, labels, weight, None, None)
        assert log_probs.dtype == torch.float32
        (found[device],) = torch.autograd.grad(log_probs, hidden, upstream)
        assert found[device].dtype == torch.float16
    assert not found["cpu"].isfinite().all()
    scale = expected_gradient.abs().max()
    assert float((found["cuda"] - expected_gradient).abs().max() / scale) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_products_of_half_precision_are_not_rounded_to_it(dtype: torch.dtype) -> None:
    tokens = 2 * chunk_size("cuda", 5000) + 1
    with fake_gpu(), FakeTensorMode(), torch.autograd.set_multithreading_enabled(False), torch.device("cuda"):
        hidden = torch.empty(tokens, 16, dtype=dtype, requires_grad=True)
        weight, labels = torch.empty(5000, 16, dtype=dtype), torch.zeros(tokens, dtype=torch.long)
        with Operations() as operations:
            log_probs = TokenLogProbs.apply(hidden, labels, weight, None, torch.zeros(2, tokens))
            (gradient,) = torch.autograd.grad(log_probs.sum(), hidden)
        assert (gradient.dtype, gradient.device.type) == (dtype, "cuda")
    products = [made for made in operations.made if ".mm" in made[0]]
    assert products == [("aten.mm.dtype_out", torch.float32)] * 2 * 3  # two in each of three chunks


def test_a_chunk_is_128_tokens_on_a_cpu_and_counted_in_bytes_on_a_gpu() -> None:
    sizes = {words: chunk_size("cuda", words) for words in (320, 32_000, 50_257, 128_256, 151_936, 262_144)}
    assert sizes == {320: 4096, 32_000: 2048, 50_257: 1280} | dict.fromkeys((128_256, 151_936, 262_144), 1024)
    for words, tokens in sizes.items():
        assert tokens == 1024 or tokens * words * 4 <= loss.LOGITS_ON_CUDA
        assert chunk_size("cpu", words) == CHUNK == 128


class _TensorsOf(TorchDispatchMode):
    """Keeps every result of one shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.found = shape, list[torch.Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.found.append(result)
        return result


@pytest.mark.parametrize(("dtype", "tensors"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_all_chunks_share_one_tensor_of_logits_in_each_dtype(dtype: torch.dtype, tensors: int) -> None:
    hidden, weight = torch.randn(3 * CHUNK, 8, dtype=dtype, requires_grad=True), torch.randn(50, 8, dtype=dtype)
    with _TensorsOf((CHUNK, 50)) as seen:
        TokenLogProbs.apply(hidden, torch.arange(3 * CHUNK) % 50, weight, None, None)
    assert len({tensor.untyped_storage().data_ptr() for tensor in seen.found}) == tensors
