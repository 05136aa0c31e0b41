"""Memory, disk and time of a run, from the base's config alone: no weight is loaded.

The model is built on the `meta` device, where parameters have shapes and types but no values; PEFT's config or the
hand-written injection puts the adapter in, Transformers' own quantiser says which layers become 4 or 8 bits wide, the
optimizer's own code makes its state, and `plainlora.resources.activations` runs the step.
"""

import copy
import math
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import LoraConfig
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from trl import ModelConfig, get_quantization_config

from plainlora.backends import Backend, attach_adapter, count_parameters
from plainlora.errors import UserError, first_line
from plainlora.models import is_classifier, set_dropouts
from plainlora.resources.activations import (
    SHARE,
    Held,
    Step,
    count_evaluation_bytes,
    count_head_bytes,
    count_peak_bytes,
    largest_batch,
    precision,
)
from plainlora.resources.memory import free_memory, resident_memory
from plainlora.settings.arguments import dtype_of

# bitsandbytes' 4 bits: one scale for so many weights, and with double quantisation one for so many scales (QLoRA,
# Dettmers et al. 2023, arXiv:2305.14314, section 3); then the tables of 16 and 256 values that the codes stand for.
BLOCK, BLOCK_OF_SCALES = 64, 256
TABLE, TABLE_OF_SCALES = 16 * 4, 256 * 4 + 4

# What a checkpoint holds beside weights, optimizer and tokenizer: random generators, schedule, arguments, configs,
# card, manifest; then what a tensor costs in a file beside its values, and an entry of the log.
SMALL_FILES, TENSOR_ENTRY, LOG_ENTRY = 32_000, 300, 250

MARKS = ("lora_A", "lora_B", "base_layer", "original_module", "trained_module", "modules_to_save")


@dataclass(frozen=True)
class Target:
    """What is trained under one name.

    Attributes:
        total: Parameters of all modules of that name, the adapters' included.
        trainable: Those of them that are trained.
    """

    total: int
    trainable: int


@dataclass(frozen=True)
class Footprint:
    """What a run needs. Sizes are in bytes; what a device's or a model's kind makes unknown is `None`.

    Attributes:
        device: Where training runs.
        total_parameters: Of the model with its adapter.
        trainable_parameters: Those of them that are trained.
        targets: By the last part of the modules' names, see `Target`.
        weights: Of the frozen base, or of the whole model where its own weights are trained, as the run stores it.
        weights_by_format: The same in fp32, bf16 (or fp16), NF4, and NF4 with double quantisation.
        adapters: What is trained beside the base.
        gradients: Of all that is trained.
        optimizer: State of the optimizer.
        optim: Its name.
        initial: A copy of the trained weights as they were, kept on the CPU where the model's own are trained.
        activations: What a step holds at most without gradient checkpointing, gradients as far as it makes them.
        activations_checkpointed: The same with it.
        evaluation: What an evaluation step holds at most.
        loss_head: What the loss of a language model holds at most, a part of the activations.
        holes: Of a CPU's heap, see `plainlora.resources.activations.Held`.
        libraries: What this process holds already on a CPU: libraries and rows.
        mapped: Of a checkpoint on disk, pages that stay resident on a CPU beside the layers quantised from them.
        checkpointing: Whether the run computes activations again: as it was told to, or where they do not fit.
        peak: The most that the device's memory holds for one process; on a CPU all that is resident.
        free: What is free of it, for each process.
        fits: Whether the rest of the peak is below that.
        checkpoint: One checkpoint on disk.
        checkpoints: How many of them lie there at the same time, the one that is being written included.
        result: Adapter or model and tokenizer, once.
        merged: The merged model, if it is asked for.
        disk_needed: All of these.
        disk_free: What is free on the disk of `output_dir`.
        disk_fits: Whether it is enough.
        tokens: That are trained on, all epochs.
        steps: Of the optimizer.
        flops: Floating-point operations of the matrix products with weights; attention's own are left out.
        flops_per_second: Of a bare product of two matrices here, in the type that training computes in.
        seconds_at_least: The quotient: no run is faster.
    """

    device: str
    total_parameters: int
    trainable_parameters: int
    targets: dict[str, Target]
    weights: int
    weights_by_format: dict[str, int]
    adapters: int
    gradients: int
    optimizer: int
    optim: str
    initial: int
    activations: int | None
    activations_checkpointed: int | None
    evaluation: int | None
    loss_head: int | None
    holes: int | None
    libraries: int
    mapped: int
    checkpointing: bool
    peak: int | None
    free: int | None
    fits: bool | None
    checkpoint: int
    checkpoints: int
    result: int
    merged: int
    disk_needed: int
    disk_free: int
    disk_fits: bool
    tokens: int
    steps: int
    flops: int
    flops_per_second: float
    seconds_at_least: float

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has words for."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A table for a terminal."""
        formats = ", ".join(f"{name} {_size(size)}" for name, size in self.weights_by_format.items())
        share = self.trainable_parameters / self.total_parameters
        names = ", ".join(f"{name} {target.trainable:,}" for name, target in self.targets.items() if target.trainable)
        kept, again = _size(self.activations), _size(self.activations_checkpointed)
        head = "" if self.loss_head is None else f"; the loss alone {_size(self.loss_head)}"
        rows = [
            ("parameters", f"{self.trainable_parameters:,} of {self.total_parameters:,} are trained ({share:.2%})"),
            ("", names),
            ("weights", f"{_size(self.weights)} ({formats})"),
            ("trained", f"adapter {_size(self.adapters)}, gradients {_size(self.gradients)}, "
                        f"{self.optim} {_size(self.optimizer)}"),
            ("activations", f"{kept}, {again} with gradient checkpointing{head}"),
        ]  # fmt: skip
        if self.libraries:
            also = f", pages of the checkpoint {_size(self.mapped)}" if self.mapped else ""
            text = f"libraries and rows {_size(self.libraries)}, holes in the heap {_size(self.holes)}{also}"
            rows.append(("else", text))
        how = "with" if self.checkpointing else "without"
        verdict = {True: "fits", False: "DOES NOT FIT", None: "unknown whether it fits"}[self.fits]
        free = "an unknown amount" if self.free is None else _size(self.free)
        rows += [
            ("peak", f"{_size(self.peak)} {how} gradient checkpointing, {free} free on {self.device}: {verdict}"),
            ("disk", f"{_size(self.disk_needed)} ({self.checkpoints} x {_size(self.checkpoint)} checkpoint, "
                     f"result {_size(self.result)}, merged {_size(self.merged)}), {_size(self.disk_free)} free: "
                     f"{'fits' if self.disk_fits else 'DOES NOT FIT'}"),
            ("time", f"at least {_duration(self.seconds_at_least)}: {self.steps:,} steps, {self.tokens:,} tokens, "
                     f"{self.flops:.1e} FLOPs at {self.flops_per_second / 1e9:,.0f} GFLOP/s"),
        ]  # fmt: skip
        return [f"{name:<12}{text}" for name, text in rows if text]


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 1e9:.1f} GB" if size >= 5e7 or not size else f"{size / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


def _name(option: object) -> str:
    """Of one of Transformers' choices, as it is typed."""
    return str(getattr(option, "value", option))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def nf4_bytes(values: int, nested: bool) -> int:
    """Bytes of one 4-bit weight with its scales and tables.

    Args:
        values: Numbers that it stands for.
        nested: Whether the scales are quantised too (double quantisation).
    """
    blocks = math.ceil(values / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / BLOCK_OF_SCALES) + TABLE_OF_SCALES if nested else 4 * blocks
    return math.ceil(values / 2) + scales + TABLE


def _nf4(nested: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)


def _quantization(config: PretrainedConfig, model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """As the run asks for it, or as the checkpoint is stored."""
    asked = get_quantization_config(model_args)
    own = getattr(config, "quantization_config", None)
    if asked is None and isinstance(own, dict) and own.get("quant_method") == "bitsandbytes":
        return BitsAndBytesConfig.from_dict(own)
    return asked


def _quantized(
    skeleton: PreTrainedModel, quantization: BitsAndBytesConfig, dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    """The weights that Transformers' own quantiser would quantise, by name; a classifier's head it leaves alone."""
    quantization, replaced = copy.deepcopy(quantization), copy.deepcopy(skeleton)
    if type(skeleton).__name__.endswith("ForSequenceClassification"):
        quantization.llm_int8_skip_modules = [
            name for name, _ in skeleton.named_children() if name != skeleton.base_model_prefix
        ]
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=replaced, dtype=dtype, device_map=None)
    parameters = dict(skeleton.named_parameters())
    return {
        name: parameters[name]
        for name, _ in replaced.named_parameters()
        if quantizer.param_needs_quantization(replaced, name)
    }


def weight_bytes(skeleton: PreTrainedModel, quantization: BitsAndBytesConfig | None, dtype: torch.dtype) -> int:
    """Bytes that a base's weights and buffers hold in memory.

    Args:
        skeleton: The base without an adapter, of any dtype.
        quantization: bitsandbytes' 4 or 8 bits, or `None`.
        dtype: Of everything that is not quantised.
    """
    buffers = _bytes(skeleton.buffers())
    parameters = dict(skeleton.named_parameters())
    quantized = {} if quantization is None else _quantized(skeleton, quantization, dtype)
    sizes = {name: parameter.numel() * dtype.itemsize for name, parameter in parameters.items()}
    for name, parameter in quantized.items():
        values = parameter.numel()
        if cast(BitsAndBytesConfig, quantization).load_in_4bit:
            sizes[name] = nf4_bytes(values, cast(BitsAndBytesConfig, quantization).bnb_4bit_use_double_quant)
        else:
            module = skeleton.get_submodule(name.rpartition(".")[0])
            outputs = module.nf if isinstance(module, Conv1D) else cast(nn.Linear, module).out_features
            sizes[name] = values + 4 * outputs  # one scale a row
    return buffers + sum(sizes.values())


def optimizer_bytes(training: TrainingArguments, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the state that `training.optim` keeps, made by the optimizer's own code on the `meta` device.

    Args:
        training: Which optimizer.
        parameters: What it trains, of any device.

    Raises:
        UserError: It cannot be made here: a package is missing, or it makes no state without values.
    """
    shapes = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    if not shapes:
        return 0
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer = kind(shapes, **{name: value for name, value in options.items() if name != "fused"})
        if hasattr(optimizer, "init_state"):  # bitsandbytes', whose steps need values; paged state has the same size
            optimizer.is_paged = False
            for index, parameter in enumerate(shapes):
                optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        else:
            for parameter in shapes:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
    except Exception as error:  # of many libraries
        reason = first_line(error)
        raise UserError(f"optim {_name(training.optim)}: it cannot be made here ({reason}); choose another") from error
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    return sum({tensor.untyped_storage()._cdata: tensor.nbytes for tensor in state}.values())


def _target_of(name: str) -> tuple[str, bool]:
    """The last part of the name of the module that a parameter belongs to, and whether an adapter wraps that one."""
    parts = name.split(".")
    marked = next((at for at, part in enumerate(parts) if part in MARKS), None)
    owner = parts[:-1] if marked is None else parts[:marked]
    return (owner[-1] if owner else name), marked is not None


def count_targets(model: nn.Module) -> dict[str, Target]:
    """Parameters of everything that is trained or carries what is, by the last part of the modules' names.

    Args:
        model: With its adapter, of either back end, on any device.
    """
    found: dict[str, Target] = {}
    for name, parameter in model.named_parameters():
        target, wrapped = _target_of(name)
        if wrapped or parameter.requires_grad:
            old = found.get(target, Target(0, 0))
            trainable = parameter.numel() if parameter.requires_grad else 0
            found[target] = Target(old.total + parameter.numel(), old.trainable + trainable)
    return dict(sorted(found.items()))


def count_steps(training: TrainingArguments, rows: int) -> int:
    """Optimizer steps of a run, as Trainer counts them.

    Args:
        training: Epochs, batches and accumulation.
        rows: Training rows, packed ones if they are packed.
    """
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(training.num_train_epochs * _steps_an_epoch(training, rows))


def _steps_an_epoch(training: TrainingArguments, rows: int) -> int:
    batches = math.ceil(rows / (training.per_device_train_batch_size * training.world_size))
    return max(1, math.ceil(batches / training.gradient_accumulation_steps))


def count_saves(training: TrainingArguments, steps: int) -> int:
    """Checkpoints that lie on the disk at the same time: a new one is whole before an old one goes.

    Args:
        training: When to save, and how many to keep.
        steps: Of the run.
    """
    every = training.eval_steps if _name(training.save_strategy) == "best" else training.save_steps
    strategy = _name(training.save_strategy)
    if strategy == "no" or not steps:
        return 0
    if strategy == "epoch":
        saves = math.ceil(training.num_train_epochs)
    else:
        interval = float(every or training.logging_steps)
        saves = math.ceil(steps / max(1, math.ceil(steps * interval) if interval < 1 else interval))
    if training.save_total_limit is None or training.save_total_limit <= 0:
        return saves
    return min(saves, training.save_total_limit + 1 + bool(training.load_best_model_at_end))


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a bare matrix product: the best of five, after one to warm up.

    Args:
        device: Where to multiply.
        dtype: Of both matrices.
    """
    size = 1024 if device.type == "cpu" else 4096
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        started = time.perf_counter()
        _ = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def count_flops(model: PreTrainedModel, tokens: int, trained_tokens: int, checkpointing: bool, frozen: bool) -> int:
    """Floating-point operations of the products with weights: 2 P a token forward, 2 P for the gradient of the input.

    What is trained adds 2 P for its own gradient; checkpointing does the forward pass of the blocks twice. The output
    head sees the tokens that have a label alone. `last_layers` sends no gradient through the rest: `frozen` is false.

    Args:
        model: With its adapter, on any device.
        tokens: All of the run.
        trained_tokens: Those with a label.
        checkpointing: Whether activations are computed again.
        frozen: Whether gradients pass through frozen weights.
    """
    head = model.get_output_embeddings()
    total = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight
        seen = trained_tokens if module is head else tokens
        passes = 1 + (frozen or weight.requires_grad) + weight.requires_grad
        passes += checkpointing and module is not head
        total += 2 * weight.numel() * seen * passes
    return total


def _saved_bytes(model: PreTrainedModel, lora: LoraConfig | None, new_head: bool) -> int:
    """Bytes of the file of weights: the adapter's, with a new head that stays frozen, or the whole model's."""
    saved = [
        parameter
        for name, parameter in model.named_parameters()
        if lora is None
        or parameter.requires_grad
        or (new_head and f"{model.base_model_prefix}." not in name and "original_module" not in name)
    ]
    return _bytes(saved) + TENSOR_ENTRY * len(saved)


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _free_on_disk(folder: str | Path) -> int:
    path = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def _trained_config(
    config: PretrainedConfig,
    training: TrainingArguments,
    model_args: ModelConfig,
    base_dropout: float | None,
    labels: Sequence[str] | None,
) -> PretrainedConfig:
    """The config that training sees, with the attention that it takes."""
    config = copy.deepcopy(config)
    for name, value in (getattr(training, "model_init_kwargs", None) or {}).items():
        if hasattr(config, name):
            setattr(config, name, value)
    if base_dropout is not None:
        set_dropouts(config, base_dropout)
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.use_cache = False
        if config.pad_token_id is None:
            config.pad_token_id = 0  # any: the head looks for where a text ends
    if model_args.attn_implementation is not None:
        config._attn_implementation = model_args.attn_implementation
    return config


def _prepare(
    base: PreTrainedModel,
    lora: LoraConfig | None,
    backend: Backend | None,
    adapter_dtype: str,
    trained_modules: Collection[str] | None,
) -> None:
    """Makes a bare base what the run trains."""
    if lora is not None and backend is not None:
        attach_adapter(base, copy.deepcopy(lora), backend, adapter_dtype)
        return
    base.requires_grad_(trained_modules is None)
    for name in trained_modules or ():
        base.get_submodule(name).requires_grad_(True)


def _own_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint says it has."""
    own = getattr(config, "dtype", None)
    own = getattr(torch, own, None) if isinstance(own, str) else own
    return own if isinstance(own, torch.dtype) else torch.float32


@dataclass(frozen=True)
class _Activations:
    """What `_count_activations` found; `None` where a model's code does not run without values."""

    kept: Held | None = None
    checkpointed: Held | None = None
    evaluation: Held | None = None
    head: Held | None = None


def _count_activations(step: Step, evaluation: Step) -> _Activations:
    try:
        return _Activations(
            count_peak_bytes(step),
            count_peak_bytes(step, checkpointing=True),
            count_evaluation_bytes(evaluation),
            None if step.classifies else count_head_bytes(step),
        )
    except Exception:  # whatever a model's code raises when its tensors have no values
        return _Activations()


def estimate(
    config: PretrainedConfig,
    lora: LoraConfig | None,
    training: TrainingArguments,
    model_args: ModelConfig,
    *,
    longest: int,
    rows: int,
    tokens: int,
    trained_tokens: int | None = None,
    backend: Backend | None = None,
    adapter_dtype: str = "float32",
    base_dropout: float | None = None,
    labels: Sequence[str] | None = None,
    trained_modules: Collection[str] | None = None,
    merge: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Footprint:
    """What a run will need of memory, disk and time. No weight is loaded.

    On a CPU the peak holds what this process holds already, so it should be asked where the libraries are loaded and
    the rows are tokenised. A merge after training loads the base once more and is not part of the peak.

    Args:
        config: Of the base; a classifier's with its classes, from `classifier_config`.
        lora: The adapter; `None` where the model's own weights are trained.
        training: Batches, optimizer, precision, epochs, saves.
        model_args: Dtype, quantisation and attention of the base.
        longest: Tokens of the longest row; of a packed sequence, `max_length`.
        rows: Training rows as they were tokenised, before packing.
        tokens: Theirs, in one epoch.
        trained_tokens: How many of them have a label; all if left out.
        backend: What attaches the adapter.
        adapter_dtype: Precision of the adapter.
        base_dropout: Every dropout of the base; its own if left out.
        labels: Names of the classes; `None` for a causal language model.
        trained_modules: Full names of the modules that are trained without an adapter; all if left out.
        merge: Whether the merged model is written too.
        tokenizer: Its files lie in every checkpoint.

    Raises:
        UserError: The optimizer cannot be made here, or the adapter does not fit the model.
        LoRAError: The adapter does not fit the model.
    """
    trained = _trained_config(config, training, model_args, base_dropout, labels)
    asked = dtype_of(model_args.dtype)
    dtype = _own_dtype(config) if isinstance(asked, str) else asked
    device, classifies = training.device, labels is not None
    step = Step(
        config=trained,
        prepare=partial(
            _prepare, lora=lora, backend=backend, adapter_dtype=adapter_dtype, trained_modules=trained_modules
        ),
        batch=largest_batch(training, longest),
        device=device,
        dtype=dtype,
        autocast=precision(training),
        one_pass_head=backend is not None and backend.one_pass_head,
        classifies=classifies,
        trust_remote_code=bool(getattr(training, "trust_remote_code", False)),
    )
    evaluation = replace(step, batch=largest_batch(training, longest, training.per_device_eval_batch_size))
    counted = _count_activations(step, evaluation)

    bare = replace(step, prepare=lambda base: None).build()
    model = step.build()
    quantization = _quantization(config, model_args)
    quantized = {} if quantization is None else _quantized(bare, quantization, dtype)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, optimizer = _bytes(trainable), optimizer_bytes(training, trainable)
    weights = weight_bytes(bare, quantization, dtype)
    adapters = _bytes(model.parameters()) - _bytes(bare.parameters())
    on_cpu = device.type == "cpu"
    parts = weights + adapters + optimizer + (gradients if training.gradient_accumulation_steps > 1 else 0)
    # One quantised weight at a time is made dense, in the type of the base.
    parts += max((parameter.numel() for parameter in quantized.values()), default=0) * dtype.itemsize
    initial = 0 if lora is not None else gradients
    parts += initial if on_cpu else 0

    free = free_memory(device)
    if free is not None and on_cpu:
        free //= PartialState().num_processes
    checkpointing = training.gradient_checkpointing
    if checkpointing is None:
        checkpointing = counted.kept is None or free is None or counted.kept.resident > SHARE * (free - parts)
    held = counted.checkpointed if checkpointing else counted.kept
    # A checkpoint stays mapped on a CPU as long as one tensor of it is used as it lies there; where layers are
    # quantised, that is beside what they became. Such pages are resident, but go when others need them.
    mapped = 0
    if on_cpu and quantized and _own_dtype(config) == dtype:
        mapped = weight_bytes(bare, None, dtype)
    libraries = resident_memory() if on_cpu else 0
    needed = peak = holes = None
    if held is not None and counted.evaluation is not None:
        steps_held = max(held.resident_with(counted.evaluation.events), counted.evaluation.resident)
        holes = steps_held - max(held.alive, counted.evaluation.alive)
        needed = parts + steps_held
        peak = libraries + mapped + needed

    trained_share = 1.0 if trained_tokens is None else trained_tokens / max(tokens, 1)
    sequences = rows
    if getattr(training, "packing", False):
        sequences = math.ceil(tokens / longest)
    steps = count_steps(training, sequences)
    all_tokens = math.ceil(tokens * steps / _steps_an_epoch(training, sequences))
    flops = count_flops(
        model,
        all_tokens // training.world_size,
        int(all_tokens * trained_share) // training.world_size,
        bool(checkpointing),
        frozen=lora is not None,
    )
    rate = measure_flops(device, step.autocast or dtype)

    files = _tokenizer_bytes(tokenizer)
    saved = _saved_bytes(model, lora, new_head=classifies and not is_classifier(config))
    result = saved + files + SMALL_FILES
    log = LOG_ENTRY * math.ceil(steps / max(1, training.logging_steps))
    checkpoint = result + (0 if training.save_only_model else optimizer + 3 * TENSOR_ENTRY * len(trainable)) + log
    checkpoints = count_saves(training, steps)
    merged = 0
    if merge:
        merged = sum(parameter.numel() for parameter in bare.parameters()) * _own_dtype(config).itemsize + files
    disk_needed = checkpoints * checkpoint + result + merged
    disk_free = _free_on_disk(str(training.output_dir))
    trained_count, total = count_parameters(model)
    return Footprint(
        device=str(device),
        total_parameters=total,
        trainable_parameters=trained_count,
        targets=count_targets(model),
        weights=weights,
        weights_by_format={
            "fp32": weight_bytes(bare, None, torch.float32),
            "bf16": weight_bytes(bare, None, torch.bfloat16),
            "NF4": weight_bytes(bare, _nf4(False), dtype),
            "NF4 double": weight_bytes(bare, _nf4(True), dtype),
        },
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        optim=_name(training.optim),
        initial=initial,
        activations=None if counted.kept is None else counted.kept.alive,
        activations_checkpointed=None if counted.checkpointed is None else counted.checkpointed.alive,
        evaluation=None if counted.evaluation is None else counted.evaluation.alive,
        loss_head=None if counted.head is None else counted.head.alive,
        holes=holes,
        libraries=libraries,
        mapped=mapped,
        checkpointing=bool(checkpointing),
        peak=peak,
        free=free,
        fits=None if needed is None or free is None else needed <= free,
        checkpoint=checkpoint,
        checkpoints=checkpoints,
        result=result,
        merged=merged,
        disk_needed=disk_needed,
        disk_free=disk_free,
        disk_fits=disk_needed <= disk_free,
        tokens=all_tokens,
        steps=steps,
        flops=flops,
        flops_per_second=rate,
        seconds_at_least=flops / rate,
    )
