"""Compares every causal language model and sequence classifier of the installed Transformers, made tiny.

Each architecture is built from its config with random weights and compared with PEFT (`plainlora.parity.compare`). A
language model is then trained for one step by the program's own trainer, twice: the loss must be the model's own, and
packed documents must have the same losses as alone. What is not supported is refused with the message that a user
would get.
"""

import difflib
import gc
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from trl import SFTConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.base.dropout import set_dropouts
from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from plainlora.lora.targets import Selection, condense, find_targets
from plainlora.parity.case import FORMS, Case, seed_everything
from plainlora.parity.compare import Verdict, compare
from plainlora.parity.shrink import LARGEST, NOT_BUILT, TOKENS, tiny_config
from plainlora.parity.suite import training_arguments
from plainlora.parity.tiny import byte_tokenizer
from plainlora.parity.tolerances import Tolerance
from plainlora.training.trainers import AdapterTrainer, args_for_sft

Task = Literal["causal", "classifier"]
COMPARED = ("init", "forward", "gradients", "files", "merge")
TRAINED = ("loss", "packing")  # for language models only
LEVELS = (*COMPARED, *TRAINED)
WITHIN = 1e-6  # relative
HELD = Tolerance(WITHIN, "the same sum in another order")
COARSE = 1e-3  # the largest difference that may be the rounding of fp32, and is measured again in fp64
AUTO: dict[Task, Any] = {"causal": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
LENGTHS = (9, 13, 6, 17)  # of the documents that are packed, in tokens
WORDS = 200  # upper bound of token ids; some vocabularies are small


class NotComparable(Exception):
    """In no dtype can a difference be distinguished from rounding."""


@dataclass(frozen=True)
class Architecture:
    """A model class of Transformers that a program of this project can load.

    Attributes:
        model_type: `model_type` of its `config.json`.
        class_name: The name of the model's class.
        task: The task of the program for it.
    """

    model_type: str
    class_name: str
    task: Task


@dataclass
class Outcome:
    """The outcome of one level of one architecture.

    Attributes:
        kind: `=`: identical; `close`: within `WITHIN`; `refused`: refused before training; `differs`: none of these.
        relative: The largest difference divided by the largest value of its tensor, or between two losses
            (dimensionless).
        reason: Why it was refused, or what differs.
    """

    kind: Literal["=", "close", "refused", "differs"]
    relative: float | None = None
    reason: str = ""


@dataclass
class Row:
    """The results of one architecture.

    Attributes:
        architecture: The architecture.
        targets: What LoRA adapts: `all-linear`, or other names if that is refused.
        refused: The message of the refusal.
        outcomes: The outcome of each level; empty if the model was not built.
        not_built: Why it was not built.
    """

    architecture: Architecture
    targets: str = ""
    refused: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    not_built: str = ""


def list_architectures() -> list[Architecture]:
    """All architectures of the Auto classes' mappings; a class with several configs is listed once for each."""
    mappings: dict[Task, Any] = {
        "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "classifier": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    return [
        Architecture(model_type, name if isinstance(name, str) else name[0], task)
        for task, names in mappings.items()
        for model_type, name in names.items()
    ]


def select(model_types: Sequence[str]) -> list[Architecture]:
    """The architectures of some model types; all of them if none is named.

    Raises:
        UserError: There is none of that type.
    """
    everything = list_architectures()
    known = sorted({architecture.model_type for architecture in everything})
    for name in model_types:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "it is the model_type of a config.json"
            raise UserError(f"--architectures: Transformers has no {name!r} with a program here; {hint}")
    return [architecture for architecture in everything if not model_types or architecture.model_type in model_types]


def _random_documents(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, WORDS, (length,), generator=generator).tolist() for length in lengths]


def build(architecture: Architecture, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Builds the architecture's model, tiny, without dropout, with the same random weights every time.

    The size of the weights roughly keeps the variance of activations, so that every module has an effect; with
    Transformers' own initialisation most effects are small.

    Args:
        architecture: The architecture.
        dtype: The dtype of the weights.
    """
    config = tiny_config(architecture.model_type, architecture.task)
    set_dropouts(config, 0.0)
    config.use_cache = False  # as in training; RWKV would write into the cache
    if dtype is torch.float64:
        config._experts_implementation = "eager"  # grouped products do not support fp64
    seed_everything(0)
    model = AUTO[architecture.task].from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.is_floating_point() and (weight.ndim > 1 or name.endswith("bias")):
                size = 0.1 if weight.ndim == 1 else 0.7 / weight.shape[-1] ** 0.5
                weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return cast(PreTrainedModel, model)


def _inputs(architecture: Architecture) -> dict[str, torch.Tensor]:
    ids = torch.tensor(_random_documents((24, 24)))
    if architecture.task == "classifier":
        ids[:, -1] = TOKENS["eos_token_id"]  # which token BART and similar models read
    labels = ids if architecture.task == "causal" else torch.arange(len(ids))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _lora(model: PreTrainedModel, architecture: Architecture) -> tuple[LoraConfig, str, str]:
    """An adapter for all linear layers, or without those that are refused.

    Args:
        model: The base.
        architecture: Its architecture.

    Returns:
        The adapter's config, a description of its targets, and the first refusal.

    Raises:
        LoRAError: No adapter is possible.
    """
    is_classifier = architecture.task == "classifier"
    options: dict[str, Any] = {"task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM", "r": 4, "lora_alpha": 6}
    heads = [".*(classifier|score).*"] if is_classifier else []  # trained whole
    left_out: list[str] = []
    refused = ""
    while True:
        patterns = heads + [rf"(.*\.)?{re.escape(name)}" for name in left_out]
        lora = LoraConfig(**options, target_modules="all-linear", exclude_modules="|".join(patterns) or None)
        try:
            find_targets(model, lora)
        except LoRAError as error:
            refused = refused or str(error)
            advice = re.search("add (.*) to exclude_modules", str(error))
            if advice is None:
                return _listed(model, lora, error), "", refused
            left_out += re.findall(r"'([\w.]+)'", advice[1]) + ["dt_proj"] * (
                "Mamba" in refused
            )  # also read without a call
        else:
            return lora, f"all-linear{''.join(f', not {name}' for name in left_out)}", refused


def _listed(model: PreTrainedModel, lora: LoraConfig, error: LoRAError) -> LoraConfig:
    """An adapter for the modules that PEFT selects, by name, without the refused parameters."""
    with suppress(ValueError):
        selected = Selection(model, lora).selected
        listed = replace(lora, target_modules=condense(selected, model))
        find_targets(model, listed)
        return listed
    raise error


def _outcome(verdict: Verdict) -> Outcome:
    if verdict.identical:
        return Outcome("=")
    if verdict.status == "pass":
        return Outcome("close", verdict.max_rel)
    return Outcome("differs", verdict.max_rel, verdict.reason)


def _compare(architecture: Architecture, lora: LoraConfig) -> dict[str, Outcome]:
    """The outcomes of the levels that are compared with PEFT. A difference in fp32 is measured again in fp64."""
    found: dict[str, Outcome] = {}
    for dtype in (torch.float32, torch.float64):
        case = Case(
            name=architecture.class_name,
            make_base=partial(build, architecture, dtype),
            config=lora,
            inputs=_inputs(architecture),
            lora_backend=FORMS[0],
        )
        verdicts = {verdict.level: _outcome(verdict) for verdict in compare(case, tolerance=HELD).verdicts}
        found |= {level: verdicts[level] for level in COMPARED if level not in found or found[level].kind == "differs"}
        differing = {level: outcome.relative or 1.0 for level, outcome in found.items() if outcome.kind == "differs"}
        if max(differing.values(), default=1.0) > COARSE or dtype is torch.float64:
            break
        if fault := _fault_in_fp64(architecture):
            rounded = ", ".join(f"{level} by {relative:.1e}" for level, relative in differing.items())
            raise NotComparable(f"fp32 rounds {rounded}, and its code does not compute in fp64: {fault}")
    return found


def _fault_in_fp64(architecture: Architecture) -> str:
    """Why a model has no gradients in fp64; empty if it has some."""
    try:
        loss = build(architecture, torch.float64)(**_inputs(architecture)).loss
        loss.backward()
    except Exception as error:  # whatever a model's own code raises
        return _one_line(error)
    return "" if loss.isfinite() else "its loss is not finite"


def _train_a_step(model: nn.Module, documents: list[list[int]], packing: bool) -> float:
    """The loss of one training step of the program on some documents."""
    with tempfile.TemporaryDirectory() as scratch:
        options = {"output_dir": scratch, "per_device_train_batch_size": 1 if packing else len(documents)}
        args = SFTConfig(**training_arguments(1, **options), max_length=sum(map(len, documents)), packing=packing)
        rows = Dataset.from_dict({"input_ids": documents, "labels": documents})
        tokenizer, backend = byte_tokenizer(), BACKENDS[FORMS[0]]
        trainer = AdapterTrainer(
            model, backend, args=args_for_sft(args), train_dataset=rows, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


@torch.no_grad()
def _own_loss(model: PreTrainedModel, documents: list[list[int]]) -> float:
    """The loss of the model's own forward for documents of one length, with its router's auxiliary loss."""
    ids = torch.tensor(documents)
    options = {"output_router_logits": True} if _routes(model) else {}
    return float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **options).loss)


def _routes(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0) != 0.0


def _train(architecture: Architecture, lora: LoraConfig, level: str) -> Outcome:
    """Compares the loss of a training step with the model's own loss, of a batch or of packed documents."""
    packing = level == "packing"
    base, model = build(architecture), build(architecture)
    documents = _random_documents(LENGTHS if packing else (12, 12, 12))
    if packing and _routes(base):  # a router's loss depends on the batch
        for each in (base, model):
            each.config.get_text_config().router_aux_loss_coef = 0.0
    try:
        found = _train_a_step(attach_adapter(model, lora, BACKENDS[FORMS[0]]), documents, packing)
    except (UserError, LoRAError) as error:
        return Outcome("refused", reason=str(error))
    apart = [[document] for document in documents] if packing else [documents]
    sums = [_own_loss(base, batch) * sum(len(document) - 1 for document in batch) for batch in apart]
    expected = sum(sums) / sum(len(document) - 1 for document in documents)
    relative = abs(found - expected) / abs(expected)
    reason = "" if relative <= WITHIN else f"a loss of {found:.6f} is trained, the model's own is {expected:.6f}"
    return Outcome("=" if relative == 0 else "differs" if reason else "close", relative, reason)


def examine(architecture: Architecture) -> Row:
    """Runs one architecture through every level. An exception is recorded in the row.

    Args:
        architecture: The architecture.
    """
    row = Row(architecture)
    try:
        with _in_silence():
            _fill(row)
    except Exception as error:  # whatever a model's own code raises
        row.not_built = str(error) if isinstance(error, NotComparable) else _one_line(error)
    gc.collect()
    return row


def _fill(row: Row) -> None:
    architecture = row.architecture
    row.not_built = NOT_BUILT.get(architecture.model_type, "")
    if row.not_built:
        return
    with torch.device("meta"):
        config = tiny_config(architecture.model_type, architecture.task)
        size = sum(value.numel() for value in AUTO[architecture.task].from_config(config).parameters())
    if size > LARGEST:
        row.not_built = f"it has {size:,} parameters even with small sizes"
        return
    model = build(architecture)
    with torch.no_grad():
        loss = float(model(**_inputs(architecture)).loss)
    if not torch.tensor(loss).isfinite():
        row.not_built = "its loss on random weights is not finite"
        return
    levels = LEVELS if architecture.task == "causal" else COMPARED
    try:
        lora, what, row.refused = _lora(model, architecture)
        row.targets = what or ", ".join(sorted(lora.target_modules or ()))
        del model
        row.outcomes = _compare(architecture, lora)
    except LoRAError as error:
        row.refused = str(error)
        row.outcomes = {level: Outcome("refused", reason=str(error)) for level in levels}
        return
    for level in TRAINED if architecture.task == "causal" else ():
        try:
            row.outcomes[level] = _train(architecture, lora, level)
        except Exception as error:
            row.outcomes[level] = Outcome("differs", reason=_one_line(error))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


@contextmanager
def _in_silence() -> Iterator[None]:
    """Silences warnings of libraries about tiny models within the block."""
    logger = logging.getLogger("accelerate")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
