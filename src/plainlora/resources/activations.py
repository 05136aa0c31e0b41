"""Counts the peak memory of a training or evaluation step before training starts.

The model's own code runs one step on tensors that have shape, dtype and device but no values (`FakeTensorMode`). They
go through the same kernels as real tensors, but take no memory and little time.
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

# TRL's own head works on tiles of at most this many tokens and vocabulary entries, in at most fp32.
# https://github.com/huggingface/trl/blob/v1.16.0/trl/kernels/chunked_logprob.py
TRL_TILE = (4096, 32768)
OPERATIONS = 250_000  # of a step, above which counting is given up: half a minute; a 70B Llama needs a third of them
MANY_TOKENS = 4096  # up to here the whole loss head is run, which takes a second; above, only a few of its tiles


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run.

    Attributes:
        rows: Number of sequences.
        length: Number of tokens in each.
        masked: Whether attention gets a mask, `(rows, 1, length, length)`: for padding, or to keep packed rows
            apart.
    """

    rows: int
    length: int
    masked: bool


def largest_batch(args: TrainingArguments, longest: int, rows: int | None = None) -> Batch:
    """The largest batch that the trainer collates: padded rows, or packed rows in one sequence.

    Args:
        args: Batch size, and packing where SFTTrainer does it.
        longest: Length of the longest row, in tokens.
        rows: Number of rows in a batch; that of a training batch if left out.
    """
    rows = args.per_device_train_batch_size if rows is None else rows
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        return Batch(1, rows * longest, masked=True)
    return Batch(rows, longest, masked=rows > 1)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages that are allocated within the block and still alive, each once.

    If two such blocks are nested, only the inner one counts.

    Args:
        others: Tensors whose storages are not counted: the weights, of which operations return views.
        most: Number of operations above which `RuntimeError` is raised; no limit if left out.

    Attributes:
        now: Bytes alive now.
        peak: The most bytes that were alive at a time.
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
            raise RuntimeError(f"a step takes more than {self._most:,} operations, as if it computed token by token")
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
    """Moves a model from the `meta` device to another one, without values. Shared weights stay shared.

    `Module.to_empty` cannot do it, because FakeTensorMode accepts no tensors of the `meta` device.
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
def _without_packing_detection() -> Iterator[None]:
    """Stops Transformers from assuming packed rows, and building their mask, because positions have no values.

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
    """One forward and backward pass over the largest batch: the inputs on which its memory depends.

    A quantised base is counted as a dense one: its activations are the same.

    Attributes:
        config: The base's config as it is trained, with its dropouts and its attention implementation.
        prepare: Prepares a bare base for training: attaches the adapter, or sets which weights need gradients.
        batch: The largest batch.
        device: The device that trains.
        dtype: The dtype of the base's weights.
        autocast: The dtype of mixed precision; `None` without it.
        one_pass_head: Whether a frozen output head computes its loss in one pass.
        classifies: Whether the model is a sequence classifier rather than a causal language model.
        trust_remote_code: Whether the base's own code may run.
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
        """The prepared base on the `meta` device: names, shapes and dtypes without values."""
        auto = AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM
        config = copy.deepcopy(self.config)
        options = code_options(config, auto, self.trust_remote_code)
        with torch.device("meta"):
            base = cast(PreTrainedModel, auto.from_config(config, dtype=self.dtype, **options))
            self.prepare(base)
        return base


class _ManyTiles(torch.autograd.Function):
    """`(rows, length, d) -> ()`: allocates as much memory as a loss head that processes its tokens tile by tile.

    Each further tile adds the bytes that are kept for its tokens and reuses the rest. So the bytes of any number of
    tiles follow from two small counts, and counting takes the same time for every batch.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: "_HeadBytes") -> torch.Tensor:
        """Allocates `head.kept` for the backward pass, and `head.forward`, which is freed at once."""
        kept = hidden.new_empty(head.kept, dtype=torch.uint8)
        hidden.new_empty(head.forward, dtype=torch.uint8)
        ctx.save_for_backward(kept, *([hidden] if head.keeps_hidden else []))
        ctx.head, ctx.like = head, (hidden.shape, hidden.dtype, hidden.device)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns a gradient of the hidden states, allocated while `head.backward` is alive."""
        shape, dtype, device = ctx.like
        beside = torch.empty(ctx.head.backward, dtype=torch.uint8, device=device)
        gradient = torch.empty(shape, dtype=dtype, device=device)
        del beside
        return gradient, None


@dataclass(frozen=True)
class _HeadBytes:
    """Bytes of a loss head, without the hidden states and, in the backward pass, their gradient.

    Attributes:
        kept: Bytes kept for the backward pass.
        forward: The most further bytes in the forward pass.
        backward: The most further bytes in the backward pass.
        keeps_hidden: Whether the hidden states themselves are kept for the backward pass.
    """

    kept: int
    forward: int
    backward: int
    keeps_hidden: bool

    def at(self, tokens: int, few: int, other: "_HeadBytes", more: int) -> "_HeadBytes":
        """The bytes for `tokens` tokens, on the line through this count, of `few` tokens, and `other`, of `more`."""

        def line(low: int, high: int) -> int:
            return max(0, low + (tokens - few) * (high - low) // (more - few))

        return _HeadBytes(
            line(self.kept, other.kept),
            line(self.forward, other.forward),
            line(self.backward, other.backward),
            self.keeps_hidden,
        )


def _count_head(step: Step, base: PreTrainedModel, like: torch.Tensor, tokens: int) -> _HeadBytes:
    """Counts the loss head on `tokens` tokens with hidden states like `like`."""
    rows = min(2, len(like))  # the last token of each row has no label
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
    """The loss of hidden states `(rows, length, d)`, every token with a label."""
    tokens = hidden.shape[0] * (hidden.shape[1] - 1)
    vocabulary = len(cast(nn.Linear, base.get_output_embeddings()).weight)
    tile = chunk_size(step.device.type, vocabulary) if step.one_pass_head and is_covered(base) else TRL_TILE[0]
    if tokens <= max(MANY_TOKENS, 3 * tile):
        return _loss_of_tiles(step, base, hidden)
    few, more = (_count_head(step, base, hidden, number * tile) for number in (2, 3))
    return cast(torch.Tensor, _ManyTiles.apply(hidden, few.at(tokens, 2 * tile, more, 3 * tile)))


def _loss_of_tiles(step: Step, base: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """As `_token_loss`, by running the one-pass head or TRL's on all tokens."""
    head = cast(nn.Linear, base.get_output_embeddings())
    tokens = hidden.shape[0] * (hidden.shape[1] - 1)
    labels = torch.zeros(tokens, dtype=torch.long, device=hidden.device)
    if step.one_pass_head and is_covered(base):
        mask = torch.ones(hidden.shape[0], hidden.shape[1] - 1, dtype=torch.bool, device=hidden.device)
        chosen = LabelledTokens(mask, labels, index=torch.zeros_like(labels))
        statistics = torch.zeros(2, tokens, device=hidden.device)
        found = TokenLogProbs.apply(chosen.select(hidden), labels, head.weight, head.bias, statistics)
        return chosen.spread(found).sum()
    every = hidden[:, :-1].reshape(tokens, -1)  # (N, d)
    if not hasattr(head, "bias"):  # PEFT's trainable tokens, tied: TRL's head fails, the model's own keeps all logits
        return nn.functional.cross_entropy((every @ head.weight.T).float(), labels)
    if step.device.type == "cpu":
        given = (every, head.weight, head.bias, labels, 1.0, TRL_TILE[1], None, 1.0, ("entropy", "is_top1"))
        return cast(torch.Tensor, ChunkedLogProbFunction.apply(*given)[0]).sum()
    # TRL's Triton kernels work in place, on a tile in the precision of the product.
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
    """The peak bytes of `forward` and, if its result needs a gradient, of the backward pass.

    Raises:
        RuntimeError: There are more than `OPERATIONS` operations: the model's code computes token by token.
    """
    mixed: AbstractContextManager[Any] = (
        torch.autocast(step.device.type, step.autocast) if step.autocast else nullcontext()
    )
    with LiveBytes((*base.parameters(), *base.buffers()), OPERATIONS) as alive:
        with mixed, _without_packing_detection():
            loss = forward()
        if loss.requires_grad:
            loss.backward()
    return alive.peak


@contextmanager
def _without_values() -> Iterator[None]:
    """Within the block tensors have no values.

    PyTorch's log is off, because it prints the traceback of every error besides raising it. Backward passes run in
    this thread: autograd's thread for a GPU needs the GPU, and a timeout does not stop it.

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
    """The peak bytes of a training step: activations and the gradients that it makes, without weights and optimizer.

    Args:
        step: The step to count.
        checkpointing: Whether activations are computed again in the backward pass.

    Raises:
        Exception: Of any class, if the model's code does not run on tensors without values.
    """
    base = step.build().train()
    if checkpointing:
        base.activation_checkpointing_enable()
    with _without_values():
        _to_device(base, step.device)
        inputs = _inputs(step)
        return _run(step, base, lambda: _forward(step, base, inputs))


def count_evaluation_bytes(step: Step) -> int:
    """The peak bytes of an evaluation step. Errors are those of `count_peak_bytes`."""
    base = step.build().eval()
    with _without_values(), torch.no_grad():
        _to_device(base, step.device)
        inputs = _inputs(step)
        return _run(step, base, lambda: _forward(step, base, inputs))


def least_bytes(step: Step, model: nn.Module) -> int:
    """A lower bound of `count_peak_bytes`: the hidden states of every layer from the first trained one on.

    Gradient checkpointing keeps them too. The bound needs no run of the model's code.

    Args:
        step: The step to count.
        model: The model that it trains, on any device.
    """
    layers = {name: int(found[1]) for name, _ in model.named_parameters() if (found := re.search(r"\.(\d+)\.", name))}
    trained = [layers[name] for name, each in model.named_parameters() if each.requires_grad and name in layers]
    kept = 1 + max(layers.values()) - min(trained) if trained else 0
    width = getattr(step.config.get_text_config(), "hidden_size", 0)
    itemsize = min(step.dtype.itemsize, (step.autocast or step.dtype).itemsize)
    return kept * step.batch.rows * step.batch.length * width * itemsize


def count_head_bytes(step: Step) -> int:
    """The peak bytes of a language model's loss on the largest batch, from the last hidden states on."""
    base = step.build()
    with _without_values():
        _to_device(base, step.device)
        width = cast(nn.Linear, base.get_output_embeddings()).weight.shape[1]
        hidden = torch.zeros(step.batch.rows, step.batch.length, width, dtype=step.dtype, device=step.device)
        hidden.requires_grad_()
        return _run(step, base, lambda: _token_loss(step, base, hidden.clone()))


def precision(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of mixed precision that training arguments ask for; `None` without it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
