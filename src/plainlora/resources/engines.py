"""The memory and traffic of each device under each engine of `plainlora.training.engines`, one process a device.

The parts are those of one process, counted by `plainlora.resources.peak`; this module says how each engine divides
them. With N devices, a base of W bytes, gradients of G bytes and optimizer state of O bytes:

    engine   weights   adapter          state            gathered                      sent = received, a step
    DDP      W         whole            O                -                             2 (N-1)/N G
    ZeRO-2   W         whole            (O + master)/N   -                             (N-1)/N (2 a G + adapter)
    FSDP2    W/N       whole            O                two blocks, and the tail      (N-1)/N (a gathers + 2 G)
    ZeRO-3   W/N       divided by N     (O + master)/N   the live parameters           (N-1)/N a (gathers + G)

a: number of accumulated batches. An all-reduce goes round a ring: each device sends 2 (N-1)/N of the bytes, and half
of that in an all-gather or a reduce-scatter (Patarasu and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from plainlora.resources.activations import precision
from plainlora.resources.devices import Devices
from plainlora.resources.model_states import ModelStates, optimizer_bytes
from plainlora.resources.peak import MemoryNeed, margin, needed_bytes
from plainlora.resources.plan import Plan
from plainlora.resources.weights import count_bytes, parameter_bytes, quantized_weights, weight_bytes

# DeepSpeed's defaults, in parameters; Accelerate's configs without a DeepSpeed file leave them unchanged.
# https://deepspeed.readthedocs.io/en/latest/zero3.html (`DeepSpeedZeroConfig`)
REDUCE_BUCKET = 500_000_000  # allocated whole for gradients, however few there are
PREFETCH_BUCKET = 50_000_000
MAX_REUSE_DISTANCE = 1_000_000_000  # a weight that is used again within this distance stays gathered
PERSISTENCE_THRESHOLD = 100_000  # a weight of at most this size is not sharded
SINGLE = "single_gpu.yaml"


@dataclass(frozen=True)
class EngineNeed:
    """Bytes that one device holds, and that it sends in one optimizer step.

    Attributes:
        engine: The engine's name.
        config: Its file in `accelerate_configs/`.
        weights: The frozen base's weights, as the device holds them between steps.
        gathered: The most bytes of weights gathered from other devices at a time, and, with a base in 4 or 8 bits, the
            one weight that is made dense.
        adapters: The trained weights.
        gradients: Gradients beside those that a step makes: accumulated ones, and an engine's own copies.
        buckets: DeepSpeed's buffer for reducing gradients. On a CPU only its written part takes memory.
        optimizer: The optimizer's state, with the fp32 master copies that DeepSpeed makes.
        activations: The peak of a step, including its gradients; `None` if it cannot be counted.
        margin: See `plainlora.resources.peak.MARGIN`.
        total: The sum.
        sent: Bytes that the device sends in a step. It receives as many.
        fits: Whether the total fits into the device's memory.
        fits_closely: Whether the total without the margin fits.
    """

    engine: str
    config: str
    weights: int
    gathered: int
    adapters: int
    gradients: int
    buckets: int
    optimizer: int
    activations: int | None
    margin: int | None
    total: int | None
    sent: int
    fits: bool | None
    fits_closely: bool | None


@dataclass(frozen=True)
class DevicesNeed:
    """What a run needs on several devices.

    Attributes:
        devices: Number of devices.
        memory: Bytes of memory of each.
        engines: The need of each engine. Those that keep the base whole, and so send little, come first.
        choice: The config of the first engine that fits; `None` if none does.
        checkpointing: Whether activations are computed again: by the run's setting or, if that is left open, if they
            do not fit beside a whole base.
        tokens_per_step: Tokens of one optimizer step on all devices, on average.
    """

    devices: int
    memory: int
    engines: list[EngineNeed]
    choice: str | None
    checkpointing: bool
    tokens_per_step: int


@dataclass(frozen=True)
class _Units:
    """Bytes that FSDP2 gathers together.

    Attributes:
        block: The model's largest block.
        blocks: The sum of all blocks.
        embedding: The input embedding, if it is not tied to the output head.
        tail: Final norm and output head, and a tied input embedding. Gathered once, and kept until the backward pass.
        rest: Weights in no other unit, also gathered once.
    """

    block: int
    blocks: int
    embedding: int
    tail: int
    rest: int


@dataclass(frozen=True)
class _Counter:
    """The parts of one process, and each engine's division of them. Arguments are those of `count_engines`."""

    plan: Plan
    base: PreTrainedModel
    model: PreTrainedModel
    states: ModelStates
    count: int
    alive: int | None
    memory: int

    @cached_property
    def ring(self) -> float:
        """The share of some bytes that each device sends in an all-gather."""
        return (self.count - 1) / self.count

    @cached_property
    def batches(self) -> int:
        """Number of batches that are accumulated in a step."""
        return self.plan.training.gradient_accumulation_steps

    @cached_property
    def compute(self) -> torch.dtype | None:
        """The dtype of mixed precision, if any: DeepSpeed stores weights in it, FSDP2 gathers them in it."""
        return precision(self.plan.training)

    @cached_property
    def accumulated(self) -> int:
        """Bytes of gradients accumulated from earlier batches of the step."""
        return self.states.gradients if self.batches > 1 else 0

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @cached_property
    def numbers(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.trained)

    @cached_property
    def quantized(self) -> set[str]:
        plan = self.plan
        return set() if plan.quantization is None else {*quantized_weights(self.base, plan.quantization, plan.dtype)}

    def need(
        self, engine: str, config: str, *, weights: int, gathered: int = 0, adapters: int, gradients: int,
        optimizer: int, sent: float, buckets: int = 0,
    ) -> EngineNeed:  # fmt: skip
        """Adds up the parts, and compares the sum with the device's memory."""
        gathered += self.states.dense
        total = left = fits = closely = None
        if self.alive is not None:
            left = margin(self.alive)
            closely_total = weights + gathered + adapters + gradients + buckets + optimizer + self.alive
            total = closely_total + left
            fits, closely = total <= self.memory, closely_total <= self.memory
        return EngineNeed(
            engine, config, weights, gathered, adapters, gradients, buckets, optimizer, self.alive, left, total,
            int(sent), fits, closely,
        )  # fmt: skip

    def single(self) -> EngineNeed:
        """One process."""
        states = self.states
        parts = {"weights": states.weights, "adapters": states.adapters, "optimizer": states.optimizer}
        return self.need("one process", SINGLE, **parts, gradients=self.accumulated, sent=0)

    def ddp(self) -> EngineNeed:
        """Everything whole; the reducer's buckets are a second copy of the gradients.

        https://docs.pytorch.org/docs/stable/notes/ddp.html#internal-design
        """
        states = self.states
        return self.need(
            "DDP", "ddp.yaml",
            weights=states.weights, adapters=states.adapters, optimizer=states.optimizer,
            gradients=self.accumulated + states.gradients,
            sent=2 * self.ring * states.gradients,
        )  # fmt: skip

    def zero2(self) -> EngineNeed:
        """The base whole; optimizer state, fp32 master copies and averaged gradients divided by the number of devices.

        Gradients are reduced after every batch, weights gathered after every step.
        """
        part, itemsize = math.ceil(self.numbers / self.count), self._itemsize
        return self.need(
            "ZeRO-2", "deepspeed_zero2.yaml",
            weights=weight_bytes(self.base, self.plan.quantization, self.compute or self.plan.dtype),
            adapters=itemsize * sum(self._beside_base),
            gradients=part * torch.float32.itemsize,
            buckets=REDUCE_BUCKET * itemsize,
            optimizer=self._optimizer_part(part) + part * torch.float32.itemsize,
            sent=self.ring * itemsize * self.numbers * (2 * self.batches + 1),
        )  # fmt: skip

    def fsdp2(self) -> EngineNeed:
        """The base sharded, trained weights whole. 4-bit weights stored as uint8 stay whole (accelerate#3987).

        A block is gathered into one buffer and copied out of it while the next one is gathered: twice its bytes,
        beside the tail. The tail itself is held twice until the next block is gathered, in the backward pass.

        https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/fsdp_utils.py
        (`fsdp2_prepare_model`)
        https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py
        (Note: Overlapping all-gather copy-in and all-gather)
        """
        states, units = self.states, self._units
        gathers = 2 * (units.blocks + units.embedding) + units.tail + units.rest
        return self.need(
            "FSDP2", "fsdp2.yaml",
            weights=self._divided(self._sizes, self._left_whole),
            gathered=units.tail + units.rest + max(2 * units.block, units.tail),
            adapters=states.adapters, optimizer=states.optimizer, gradients=self.accumulated,
            sent=self.ring * (self.batches * gathers + 2 * states.gradients),
        )  # fmt: skip

    def zero3(self) -> EngineNeed:
        """Base and adapter sharded. Small weights stay whole, and weights that are used again soon stay gathered.

        A weight is used in the forward and in the backward pass, so the last `MAX_REUSE_DISTANCE / 2` parameters of
        the forward pass stay gathered. Prefetched weights are held beside them, once in the buffer and once copied
        out.
        """
        part, itemsize = math.ceil(self.numbers / self.count), self._itemsize
        sizes = parameter_bytes(self.base, self.plan.quantization, self.compute or self.plan.dtype)
        numbers = {name: parameter.numel() for name, parameter in self.base.named_parameters()}
        weights = [(numbers[name], size) for name, size in sizes.items()]
        weights += [(number, itemsize * number) for number in self._beside_base]
        small = sum(size for number, size in weights if number <= PERSISTENCE_THRESHOLD)
        large = sum(size for number, size in weights if number > PERSISTENCE_THRESHOLD)
        per_number = large / max(1, sum(number for number, _ in weights if number > PERSISTENCE_THRESHOLD))
        kept = min(large, int(MAX_REUSE_DISTANCE / 2 * per_number))
        ahead = int(2 * max(PREFETCH_BUCKET, *numbers.values()) * per_number)
        small_trained = sum(p.numel() for p in self.trained if p.numel() <= PERSISTENCE_THRESHOLD)
        master = 0 if itemsize == torch.float32.itemsize else torch.float32.itemsize  # else the part itself is used
        return self.need(
            "ZeRO-3", "deepspeed_zero3.yaml",
            weights=self._divided(sizes, whole=()),
            gathered=min(large, kept + ahead) + small,
            adapters=math.ceil(itemsize * sum(self._beside_base) / self.count),
            gradients=part * torch.float32.itemsize,
            buckets=REDUCE_BUCKET * itemsize,
            optimizer=self._optimizer_part(part) + part * master,
            sent=self.ring * (
                self.batches * (2 * large - kept + itemsize * self.numbers) + itemsize * small_trained
            ),
        )  # fmt: skip

    @cached_property
    def _itemsize(self) -> int:
        """Bytes of one trained parameter under DeepSpeed."""
        return (self.compute or self.trained[0].dtype).itemsize

    @cached_property
    def _beside_base(self) -> list[int]:
        """Number of parameters of each weight trained beside the base; empty if the base's own are trained."""
        return [] if self.plan.lora is None else [parameter.numel() for parameter in self.trained]

    def _optimizer_part(self, part: int) -> int:
        """Bytes of the optimizer's state for one device's part, a flat fp32 tensor of `part` numbers."""
        return optimizer_bytes(self.plan.training, [nn.Parameter(torch.empty(part, device="meta"))])

    @cached_property
    def _left_whole(self) -> set[str]:
        """The base's weights that FSDP2 does not shard: 4-bit weights stored as uint8, and trained ones."""
        quantization = self.plan.quantization
        floating = quantization is not None and getattr(
            quantization.bnb_4bit_quant_storage, "is_floating_point", False
        )
        bytes_of_four = set() if floating else self.quantized
        names = {name for name, _ in self.base.named_parameters()}
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return bytes_of_four | (names & trained)

    def _divided(self, sizes: dict[str, int], whole: Collection[str]) -> int:
        """Bytes of each device's part of the base, plus the whole weights and buffers."""
        parts = (size if name in whole else math.ceil(size / self.count) for name, size in sizes.items())
        return count_bytes(self.base.buffers()) + sum(parts)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Bytes of the base's weights as the run stores them, by name."""
        return parameter_bytes(self.base, self.plan.quantization, self.plan.dtype)

    @cached_property
    def _units(self) -> _Units:
        """As `fsdp2_prepare_model` of Accelerate divides the model."""
        base = self.base
        left = {name: size for name, size in self._sizes.items() if name not in self._left_whole}
        if self.compute:
            dense = ((name, each) for name, each in base.named_parameters() if name not in self.quantized)
            left |= {name: each.numel() * self.compute.itemsize for name, each in dense if name in left}

        def take(modules: Iterable[nn.Module | None]) -> int:
            """Bytes of some modules' weights. They are removed from `left`, so that no other unit counts them."""
            own = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
            names = [name for name, parameter in base.named_parameters() if id(parameter) in own and name in left]
            return sum(left.pop(name) for name in names)

        kinds = set(base._no_split_modules or ())
        blocks = [take([module]) for module in base.modules() if type(module).__name__ in kinds]
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        norms = [module for module in base.base_model.children() if "Norm" in type(module).__name__]
        tied = head is not None and embedding.weight is head.weight
        apart = 0 if tied else take([embedding])
        tail = take([embedding if tied else None, *norms[-1:], head])
        return _Units(max(blocks, default=0), sum(blocks), apart, tail, sum(left.values()))


def count_engines(
    plan: Plan,
    base: PreTrainedModel,
    model: PreTrainedModel,
    states: ModelStates,
    memory: MemoryNeed,
    devices: Devices,
) -> DevicesNeed:
    """What a run needs on each device under each engine, and which engine to choose.

    The GPU's context and the buffers of the communication library are not counted.

    Args:
        plan: The run in one process.
        base: Its base, on the `meta` device.
        model: The base as it is trained, with its adapter if there is one.
        states: Bytes that one process holds beside a step.
        memory: The memory that one process needs.
        devices: The number of devices and their memory.
    """
    checkpointing = plan.training.gradient_checkpointing
    if checkpointing is None:
        kept = memory.activations
        checkpointing = kept is None or needed_bytes(states, kept) > devices.memory
    training = memory.activations_checkpointed if checkpointing else memory.activations
    alive = None if training is None or memory.evaluation is None else max(training, memory.evaluation)
    counter = _Counter(plan, base, model, states, devices.count, alive, devices.memory)
    if devices.count == 1:
        engines = [counter.single()]
    else:
        engines = [counter.ddp(), counter.zero2(), counter.fsdp2(), counter.zero3()]
    choice = next((engine.config for engine in engines if engine.fits), None)
    tokens = plan.tokens_per_step(devices.count)
    return DevicesNeed(devices.count, devices.memory, engines, choice, bool(checkpointing), tokens)
