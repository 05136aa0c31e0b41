"""What a step holds at most, the backward pass included, counted before training starts.

The model's own code runs one step on tensors that have shape, type and device but no values (`FakeTensorMode`). They
take the kernels that real ones take, attention's included, but no memory and little time.
"""

import copy
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    masking_utils,
)
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from plainlora.base.remote_code import code_options
from plainlora.fast.head import LabelledTokens, TokenLogProbs, chunk_size, is_covered

# TRL's own head works on tiles of at most so many tokens and words, in fp32 at the most.
# https://github.com/huggingface/trl/blob/v1.16.0/trl/kernels/chunked_logprob.py
TRL_TILE = (4096, 32768)
OPERATIONS = 250_000  # of a step, after which its count is given up: three times those of a 70B Llama, half a minute
MANY_TOKENS = 4096  # up to here a loss head is run as it is, which takes a second; beyond from a few of its tiles


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run.

    Attributes:
        rows: Sequences.
        length: Tokens of each.
        masked: Whether attention is given a mask, `(rows, 1, length, length)`: for padding, or to keep packed rows
            apart.
    """

    rows: int
    length: int
    masked: bool


def largest_batch(args: TrainingArguments, longest: int, rows: int | None = None) -> Batch:
    """What the trainer collates at most: rows side by side, or, packed, one after the other.

    Args:
        args: Batch size, and packing where SFTTrainer does it.
        longest: Length of the longest row, in tokens.
        rows: Of a batch; the training batch's if left out.
    """
    rows = args.per_device_train_batch_size if rows is None else rows
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        return Batch(1, rows * longest, masked=True)
    return Batch(rows, longest, masked=rows > 1)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are made inside and still alive, each once.

    Of two, one inside the other, the inner one counts alone.

    Args:
        others: Tensors whose storages are not counted: the weights, which come back as views of themselves.
        most: Operations after which it raises `RuntimeError`; without end if left out.

    Attributes:
        now: Bytes alive.
        peak: Bytes alive at most.
    """

    _innermost: "LiveBytes | None" = None

    def __init__(self, others: Iterable[torch.Tensor], most: int | None = None) -> None:
        super().__init__()
        self._most, self._operations = most, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}
        self.now = self.peak = 0

    def __enter__(self) -> "LiveBytes":
        self._outer, LiveBytes._innermost = LiveBytes._innermost, self
        return cast(LiveBytes, super().__enter__())

    def __exit__(self, *error: Any) -> None:
        LiveBytes._innermost = self._outer
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        if self._most is not None and self._operations > self._most:
            raise RuntimeError(f"a step takes more than {self._most:,} operations: token after token, it seems")
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results) if LiveBytes._innermost is self else ():
            if isinstance(result, torch.Tensor):
                self._count(result.untyped_storage())
        self.peak = max(self.peak, self.now)
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self.now += size
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def _to_device(model: nn.Module, device: torch.device) -> None:
    """Gives a model of the `meta` device weights without values on another one; what is shared stays shared.

    `Module.to_empty` cannot: FakeTensorMode takes no tensors of the `meta` device.
    """
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = cast(Any, made[old])


@contextmanager
def _one_row_not_taken_for_packed_ones() -> Iterator[None]:
    """Where positions have no values, Transformers presumes packed rows, and a mask that a real step does without.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/masking_utils.py
    (`find_packed_sequence_indices`)
    """
    theirs = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = theirs


@dataclass(frozen=True)
class Step:
    """One forward and backward pass over the largest batch, as far as its memory depends on it.

    A quantised base is counted as a dense one: its activations are the same.

    Attributes:
        config: Of the base, as it is trained: with its dropouts and its attention implementation.
        prepare: Makes a bare base what is trained: puts the adapter in, or says which weights need gradients.
        batch: The largest.
        device: Where training runs.
        dtype: Of the base's weights.
        autocast: Type of mixed precision, if there is any.
        one_pass_head: Whether a frozen output head computes its loss in one pass.
        classifies: Whether the model is a sequence classifier rather than a causal language model.
        trust_remote_code: As for the base.
    """

    config: PretrainedConfig
    prepare: Callable[[PreTrainedModel], object]
    batch: Batch
    device: torch.device
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    one_pass_head: bool = True
    classifies: bool = False
    trust_remote_code: bool = False

    def build(self) -> PreTrainedModel:
        """The base, prepared, on the `meta` device: names, shapes and types without values."""
        auto = AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM
        config = copy.deepcopy(self.config)
        options = code_options(config, auto, self.trust_remote_code)
        with torch.device("meta"):
            base = cast(PreTrainedModel, auto.from_config(config, dtype=self.dtype, **options))
            self.prepare(base)
        return base


class _ManyTiles(torch.autograd.Function):
    """`(rows, length, d) -> ()`: holds what a loss head holds that works through its tokens tile by tile.

    A tile more adds to what is held for every token and repeats the rest. So two counts of few tiles give all others,
    and the time that a count takes does not grow with the batch.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: "_HeadBytes") -> torch.Tensor:
        """Holds `head.kept` for the backward pass, and as much more as the forward pass takes at most."""
        kept = hidden.new_empty(head.kept, dtype=torch.uint8)
        hidden.new_empty(head.forward, dtype=torch.uint8)
        ctx.save_for_backward(kept, *([hidden] if head.keeps_hidden else []))
        ctx.head, ctx.like = head, (hidden.shape, hidden.dtype, hidden.device)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of the hidden states, beside as much as the backward pass takes at most."""
        shape, dtype, device = ctx.like
        beside = torch.empty(ctx.head.backward, dtype=torch.uint8, device=device)
        gradient = torch.empty(shape, dtype=dtype, device=device)
        del beside
        return gradient, None


@dataclass(frozen=True)
class _HeadBytes:
    """What a loss head holds beside the hidden states and, in the backward pass, their gradient.

    Attributes:
        kept: For the backward pass.
        forward: At most in the forward pass, beside that.
        backward: At most in the backward pass, beside that.
        keeps_hidden: Whether the hidden states themselves are kept for the backward pass.
    """

    kept: int
    forward: int
    backward: int
    keeps_hidden: bool

    def at(self, tokens: int, few: int, other: "_HeadBytes", more: int) -> "_HeadBytes":
        """Of as many tokens, on the line through this, of `few` tokens, and `other`, of `more`."""

        def line(low: int, high: int) -> int:
            return max(0, low + (tokens - few) * (high - low) // (more - few))

        return _HeadBytes(
            line(self.kept, other.kept),
            line(self.forward, other.forward),
            line(self.backward, other.backward),
            self.keeps_hidden,
        )


def _count_head(step: Step, base: PreTrainedModel, like: torch.Tensor, tokens: int) -> _HeadBytes:
    """Counts a head of so many tokens, of hidden states like these."""
    rows = min(2, len(like))  # beside each other, the last token of each is left out
    source = like.new_zeros(rows, tokens // rows + 1, like.shape[-1]).requires_grad_(like.requires_grad)
    size, weights = source.nbytes, base.get_output_embeddings().parameters()
    with LiveBytes((source, *weights)) as alive:
        hidden = source.clone()
        loss = _loss_of_tiles(step, base, hidden)
        before = alive.now
        del hidden
        total, forward = alive.now, alive.peak
        keeps_hidden = total == before
        if not loss.requires_grad:
            return _HeadBytes(0, forward - size, 0, keeps_hidden=False)
        alive.peak = 0
        torch.autograd.grad(loss, source)
    kept = total - size * keeps_hidden
    return _HeadBytes(kept, forward - size - kept, max(0, alive.peak - total - size), keeps_hidden)


def _token_loss(step: Step, base: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The loss of `(rows, length, d)`, every token with a label."""
    tokens = hidden.shape[0] * (hidden.shape[1] - 1)
    words = len(cast(nn.Linear, base.get_output_embeddings()).weight)
    tile = chunk_size(step.device.type, words) if step.one_pass_head and is_covered(base) else TRL_TILE[0]
    if tokens <= max(MANY_TOKENS, 3 * tile):
        return _loss_of_tiles(step, base, hidden)
    few, more = (_count_head(step, base, hidden, number * tile) for number in (2, 3))
    return cast(torch.Tensor, _ManyTiles.apply(hidden, few.at(tokens, 2 * tile, more, 3 * tile)))


def _loss_of_tiles(step: Step, base: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The same by the one-pass head or by TRL's own, whose time grows with the number of tokens."""
    head = cast(nn.Linear, base.get_output_embeddings())
    tokens = hidden.shape[0] * (hidden.shape[1] - 1)
    labels = torch.zeros(tokens, dtype=torch.long, device=hidden.device)
    if step.one_pass_head and is_covered(base):
        mask = torch.ones(hidden.shape[0], hidden.shape[1] - 1, dtype=torch.bool, device=hidden.device)
        chosen = LabelledTokens(mask, labels, index=torch.zeros_like(labels))
        statistics = torch.zeros(2, tokens, device=hidden.device)
        found = TokenLogProbs.apply(chosen.select(hidden), labels, head.weight, head.bias, statistics)
        return chosen.spread(found).sum()
    if step.device.type == "cpu":
        every = hidden[:, :-1].reshape(tokens, -1)  # (N, d)
        given = (every, head.weight, head.bias, labels, 1.0, TRL_TILE[1], None, 1.0, ("entropy", "is_top1"))
        return cast(torch.Tensor, ChunkedLogProbFunction.apply(*given)[0]).sum()
    # Its Triton kernels work in place, on a tile in the precision of the product.
    torch.empty(min(tokens, TRL_TILE[0]), TRL_TILE[1], dtype=step.autocast or hidden.dtype, device=hidden.device)
    return hidden.float().sum()


def _inputs(step: Step) -> dict[str, torch.Tensor]:
    batch, device = step.batch, step.device
    inputs = {"input_ids": torch.zeros(batch.rows, batch.length, dtype=torch.long, device=device)}
    if batch.masked:
        kind = step.dtype if step.config._attn_implementation == "eager" else torch.bool
        shape = (batch.rows, 1, batch.length, batch.length)
        inputs["attention_mask"] = torch.ones(shape, dtype=kind, device=device)
    return inputs


def _forward(step: Step, base: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of the largest batch."""
    if step.classifies:
        labels = torch.zeros(step.batch.rows, dtype=torch.long, device=step.device)
        return cast(torch.Tensor, base(**inputs, labels=labels).loss)
    return _token_loss(step, base, base.base_model(**inputs, use_cache=False).last_hidden_state)


def _run(step: Step, base: PreTrainedModel, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that `forward`, and `backward` where gradients are asked for, hold at most.

    Raises:
        RuntimeError: It takes more than `OPERATIONS`: the model's code goes through the tokens one by one.
    """
    mixed: AbstractContextManager[Any] = (
        torch.autocast(step.device.type, step.autocast) if step.autocast else nullcontext()
    )
    with LiveBytes((*base.parameters(), *base.buffers()), OPERATIONS) as alive:
        with mixed, _one_row_not_taken_for_packed_ones():
            loss = forward()
        if loss.requires_grad:
            loss.backward()
    return alive.peak


@contextmanager
def _without_values() -> Iterator[None]:
    """Within, tensors have no values. Torch would print the traceback of what fails on them, besides raising it.

    Backward passes run in this thread: a GPU's own one needs the GPU, and is not stopped by a timeout.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_subclasses/fake_tensor.py (`log.exception`)
    """
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        logger.disabled = before


def count_peak_bytes(step: Step, *, checkpointing: bool = False) -> int:
    """Bytes alive in a training step at most, weights and optimizer apart, gradients as far as the step makes them.

    Args:
        step: What is counted.
        checkpointing: Whether activations are computed again in the backward pass.

    Raises:
        Exception: Of any kind, where the model's code does not run without values.
    """
    base = step.build().train()
    if checkpointing:
        base.activation_checkpointing_enable()
    with _without_values():
        _to_device(base, step.device)
        inputs = _inputs(step)
        return _run(step, base, lambda: _forward(step, base, inputs))


def count_evaluation_bytes(step: Step) -> int:
    """Bytes alive in an evaluation step at most; errors are those above."""
    base = step.build().eval()
    with _without_values(), torch.no_grad():
        _to_device(base, step.device)
        inputs = _inputs(step)
        return _run(step, base, lambda: _forward(step, base, inputs))


def least_bytes(step: Step, model: nn.Module) -> int:
    """Bytes that no training step does without: of every layer from the first that is trained on, the hidden states.

    Gradient checkpointing keeps them too. It takes no time, and holds where the model's code cannot be run.

    Args:
        step: What is counted.
        model: What it trains, on any device.
    """
    layers = {name: int(found[1]) for name, _ in model.named_parameters() if (found := re.search(r"\.(\d+)\.", name))}
    trained = [layers[name] for name, each in model.named_parameters() if each.requires_grad and name in layers]
    kept = 1 + max(layers.values()) - min(trained) if trained else 0
    width = getattr(step.config.get_text_config(), "hidden_size", 0)
    itemsize = min(step.dtype.itemsize, (step.autocast or step.dtype).itemsize)
    return kept * step.batch.rows * step.batch.length * width * itemsize


def count_head_bytes(step: Step) -> int:
    """Bytes that the loss of a language model's largest batch holds at most, from the last hidden state on."""
    base = step.build()
    with _without_values():
        _to_device(base, step.device)
        width = cast(nn.Linear, base.get_output_embeddings()).weight.shape[1]
        hidden = torch.zeros(step.batch.rows, step.batch.length, width, dtype=step.dtype, device=step.device)
        hidden.requires_grad_()
        return _run(step, base, lambda: _token_loss(step, base, hidden.clone()))


def precision(args: TrainingArguments) -> torch.dtype | None:
    """The type of mixed precision that training arguments ask for; `None` for none."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
