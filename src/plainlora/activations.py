"""Whether what autograd keeps for the way back fits into the free memory, counted before training starts.

The model's own code runs one step on tensors that have shape, type and device but no values (`FakeTensorMode`). They
take the kernels that real ones take, attention's included, but no memory and little time.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, masking_utils
from trl import SFTConfig

from plainlora.backends import Backend, attach_adapter
from plainlora.loss import TokenLogProbs, is_covered

SHARE = 0.8  # of the free memory that is planned with; the rest is for fragments and for what libraries set aside
HEAP = 1.2  # bytes that a process holds on a CPU per byte alive in its heap: 1.0 to 1.3, measured with glibc
OPTIMIZER_COPIES = 3  # of every trained weight: its gradient and Adam's two moments

# TRL's own head works on tiles of at most so many (tokens, words) and holds up to nine of them in fp32: 8.3, measured
# without Triton. https://github.com/huggingface/trl/blob/v1.16.0/trl/kernels/chunked_logprob.py
TRL_TILE, TRL_TILES = (4096, 32768), 9


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


def largest_batch(args: SFTConfig, longest: int) -> Batch:
    """What SFTTrainer collates at most: rows side by side, or, packed, one after the other.

    Args:
        args: Batch size and packing.
        longest: Length of the longest row, in tokens.
    """
    rows = args.per_device_train_batch_size
    if args.packing or args.padding_free:
        return Batch(1, rows * longest, masked=True)
    return Batch(rows, longest, masked=rows > 1)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are made inside and still alive, each once.

    Args:
        others: Tensors whose storages are not counted: the weights, which come back as views of themselves.

    Attributes:
        peak: Bytes alive at most.
    """

    def __init__(self, others: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in others}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._count(result.untyped_storage())
        self.peak = max(self.peak, self._now)
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self._now += size
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


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


def _loss(base: PreTrainedModel, hidden: torch.Tensor, one_pass_head: bool) -> torch.Tensor:
    """The loss of `(rows, length, d)`, every token with a label; without the one-pass head, a bound of TRL's."""
    hidden = torch.cat(tuple(hidden[:, :-1]))  # (N, d), a copy as the choice of labelled tokens is
    tokens = len(hidden)
    head = cast(nn.Linear, base.get_output_embeddings())
    if one_pass_head and is_covered(base):
        labels = torch.zeros(tokens, dtype=torch.long, device=hidden.device)
        statistics = torch.zeros(2, tokens, device=hidden.device)
        return TokenLogProbs.apply(hidden, labels, head.weight, head.bias, statistics).sum()
    torch.empty(TRL_TILES, min(tokens, TRL_TILE[0]), TRL_TILE[1], device=hidden.device)
    return hidden.sum()


def count_peak_bytes(
    config: PretrainedConfig,
    attach: Callable[[PreTrainedModel], nn.Module],
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    one_pass_head: bool = True,
    trust_remote_code: bool = False,
) -> int:
    """Bytes that a step without gradient checkpointing holds at most, weights and optimizer apart.

    A quantised base is counted as a dense one: its activations are the same.

    Args:
        config: Of the base, as it is trained: with its dropouts and its attention implementation.
        attach: Puts the adapter into a base.
        batch: The largest.
        device: Where training runs.
        dtype: Of the base's weights.
        autocast: Type of mixed precision, if there is any.
        one_pass_head: Whether a frozen output head computes its loss in one pass.
        trust_remote_code: As for the base.

    Raises:
        Exception: Of any kind, where the model's code does not run without values.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        attach(base)
    base.train()
    inputs: dict[str, torch.Tensor] = {}
    mixed: AbstractContextManager[Any] = torch.autocast(device.type, autocast) if autocast else nullcontext()
    with FakeTensorMode():
        _to_device(base, device)
        inputs["input_ids"] = torch.zeros(batch.rows, batch.length, dtype=torch.long, device=device)
        if batch.masked:
            kind = dtype if config._attn_implementation == "eager" else torch.bool
            shape = (batch.rows, 1, batch.length, batch.length)
            inputs["attention_mask"] = torch.ones(shape, dtype=kind, device=device)
        with LiveBytes((*base.parameters(), *base.buffers())) as alive:
            with mixed, _one_row_not_taken_for_packed_ones():
                hidden = base.base_model(**inputs, use_cache=False).last_hidden_state
                loss = _loss(base, hidden, one_pass_head)
            del hidden
            loss.backward()
    return alive.peak


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def needs_checkpointing(
    args: SFTConfig,
    base: PreTrainedModel,
    lora: LoraConfig,
    backend: Backend,
    adapter_dtype: str,
    longest: int,
    free: int | None,
    say: Callable[[str], None],
) -> bool:
    """Whether training has to compute activations again on the way back, because they do not fit; says why.

    All processes come to the same decision: that of the one with the least memory.

    Args:
        args: Batch size, packing and precision.
        base: With the adapter in it.
        lora: That adapter.
        backend: What attached it.
        adapter_dtype: Its precision.
        longest: Length of the longest row, in tokens.
        free: Bytes that were free before the base was loaded; `None` if that is unknown.
        say: Told the decision in one line.
    """
    frees = gather_object([free])
    if any(each is None for each in frees):
        say(f"free memory of {args.device} is unknown: gradient checkpointing")
        return True
    shared = PartialState().num_processes if args.device.type == "cpu" else 1
    trained = _bytes(parameter for parameter in base.parameters() if parameter.requires_grad)
    left = min(frees) // shared - _bytes((*base.parameters(), *base.buffers())) - OPTIMIZER_COPIES * trained
    batch = largest_batch(args, longest)
    try:
        peak = count_peak_bytes(
            copy.deepcopy(base.config),
            lambda skeleton: attach_adapter(skeleton, copy.deepcopy(lora), backend, adapter_dtype),
            batch,
            args.device,
            base.dtype,
            torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            backend.one_pass_head,
            args.trust_remote_code,
        )
    except Exception as error:  # whatever a model's code raises when its tensors have no values
        reason = (str(error).strip().splitlines() or [""])[0]
        say(f"activations cannot be counted ({type(error).__name__}: {reason[:100]}): gradient checkpointing")
        return True
    held = peak * (HEAP if args.device.type == "cpu" else 1)
    fits = held <= SHARE * left
    say(
        f"activations: {held / 1e9:.1f} GB for {args.per_device_train_batch_size} x {longest} tokens, "
        f"{max(left, 0) / 1e9:.1f} GB free: {'no ' if fits else ''}gradient checkpointing"
    )
    return not fits
