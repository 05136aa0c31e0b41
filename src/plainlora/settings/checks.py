"""Refuses settings that cannot be honoured, by name, before anything is loaded or written."""

import math
import os
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    SchedulerType,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import ModelConfig, ScriptArguments, SFTConfig

from plainlora.data.datasets import is_local
from plainlora.errors import UserError, first_line
from plainlora.settings.adapter import adapter_faults
from plainlora.settings.arguments import (
    PROJECTIONS,
    ClassifyArguments,
    ClassifyConfig,
    RecipeArguments,
    SFTArguments,
    optim_name,
    parse_mapping,
)
from plainlora.settings.device import trains_on_cpu
from plainlora.settings.launcher import asks_for_fsdp, sharding_engine

COMMIT = re.compile(r"[0-9a-f]{40}")

# Smallest and largest value, both allowed. The libraries check these late, or not at all.
BOUNDS: dict[str, tuple[float, float]] = {
    "max_length": (1, math.inf),
    "max_train_rows": (1, math.inf),
    "max_eval_rows": (1, math.inf),
    "measured_train_rows": (1, math.inf),
    "loraplus_lr_ratio": (1, math.inf),
    "max_truncated": (0, 1),
    "exact_match_rows": (0, math.inf),
    "max_new_tokens": (1, math.inf),
    "sample_steps": (1, math.inf),
    "early_stopping_patience": (1, math.inf),
    "dataset_num_proc": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_train_epochs": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_epsilon": (0, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
BELOW_1 = ("base_dropout", "adam_beta1", "adam_beta2")  # and at least 0

# Arguments of `from_pretrained` that have a flag of their own, so model_init_kwargs must not set them.
OWN_FLAGS = {"revision", "dtype", "quantization", "attn_implementation", "trust_remote_code", "dropout"}

# Settings that no method but lora takes; no recipe has them by default.
ADAPTER_SETTINGS = ("adapter_name_or_path", "lora_config", "loraplus_lr_ratio", "use_dora", "use_rslora")

# Metrics beside the loss: of a classifier's validation rows, and of a language model's test rows.
SCORES = ("accuracy", "f1")
SFT_SCORES = ("perplexity", "entropy", "mean_token_accuracy")


def sft_faults(
    recipe: SFTArguments, script: ScriptArguments, training: SFTConfig, model: ModelConfig
) -> Iterator[str]:
    """Yields what is wrong with the settings of `recipes/sft.py`, each with what to do."""
    yield from common_faults(recipe, script, training, model)
    yield from _refused_by_trainer(training)
    if model.lora_task_type != "CAUSAL_LM":
        yield f"lora_task_type {model.lora_task_type}: this program trains causal language models; leave it out"
    yield from _unsupported(
        {
            "dataset_kwargs": (training.dataset_kwargs, "rows are prepared by this project, not by TRL"),
            "use_liger_kernel": (training.use_liger_kernel, "TRL has deprecated it; its own fused head is used"),
        }
    )
    if training.trust_remote_code:
        yield from _unpinned_code(str(model.model_name_or_path), model.model_revision, recipe.merge)
    if training.packing and training.packing_strategy == "wrapped":
        yield (
            "packing_strategy=wrapped is refused: it cuts rows in two and lets examples attend to each other "
            "(trl#1230); use bfd"
        )
    if training.packing and training.packing_strategy == "bfd_split":
        yield "packing_strategy=bfd_split: longer rows are dropped or truncated (on_overflow) before packing; use bfd"
    if training.truncation_mode == "keep_end" and recipe.on_overflow != "truncate":
        yield "truncation_mode keep_end: longer rows are dropped; set on_overflow to truncate, or leave it out"
    if training.packing and training.max_length is None:
        yield "packing needs max_length: give the length of a packed sequence"
    if (training.packing or training.padding_free) and "alora_invocation_tokens" in parse_mapping(
        "lora_config", recipe.lora_config
    ):
        yield (
            "lora_config: alora_invocation_tokens are looked for once in each row, and packing puts several documents "
            "into one; set packing and padding_free to false"
        )
    if recipe.sample_steps is not None and not recipe.sample_prompts and not recipe.exact_match_rows:
        yield "sample_steps answers the sample prompts, and there are none: give sample_prompts, or exact_match_rows"
    yield from _unknown_metric(training, SFT_SCORES)
    if training.greater_is_better and training.metric_for_best_model in ("perplexity", "eval_perplexity"):
        yield "metric_for_best_model perplexity: the lower, the better; set greater_is_better to false"


def classify_faults(
    recipe: ClassifyArguments, script: ScriptArguments, training: ClassifyConfig, model: ModelConfig
) -> Iterator[str]:
    """Yields what is wrong with the settings of `recipes/classify.py`, each with what to do."""
    yield from common_faults(recipe, script, training, model)
    yield from _unsupported(
        {
            "use_liger_kernel": (training.use_liger_kernel, "its kernels are for causal language models"),
            "label_names": (training.label_names, "the column of classes is label_column"),
            "batch_eval_metrics": (training.batch_eval_metrics, "accuracy and F1 are those of all rows"),
            "prediction_loss_only": (training.prediction_loss_only, "every row is classified and counted"),
            "dataloader_drop_last": (training.dataloader_drop_last, "every row is classified and counted"),
            "eval_do_concat_batches": (not training.eval_do_concat_batches, "accuracy and F1 are those of all rows"),
        }
    )
    yield from _unknown_metric(training, SCORES)
    if model.lora_task_type not in ("CAUSAL_LM", "SEQ_CLS"):  # the first is ModelConfig's default
        yield f"lora_task_type {model.lora_task_type}: this program classifies sequences; leave it out"
    if recipe.lora_head and recipe.train_head:
        yield "lora_head and train_head: the head carries LoRA or is trained whole, not both; give one"
    if recipe.method == "lora":
        yield from _unclear_layers(recipe, model)


def _unclear_layers(recipe: ClassifyArguments, model: ModelConfig) -> Iterator[str]:
    projections = [name for name in PROJECTIONS if getattr(recipe, f"lora_{name}")]
    given = {
        "lora_target_modules": model.lora_target_modules,
        "lora_config: target_modules": parse_mapping("lora_config", recipe.lora_config).get("target_modules"),
    }
    named = next((name for name, value in given.items() if value), None)
    if projections and named:
        yield (
            f"{named} and lora_{projections[0]}: name modules or switch projections on, not both; "
            f"--lora_{projections[0]} false switches one off"
        )
    if not projections and not named:
        yield (
            "LoRA has no layer to adapt: switch projections on, as in --lora_query true --lora_value true, or name "
            "modules with --lora_target_modules"
        )


def _refused_by_trainer(training: SFTConfig) -> Iterator[str]:
    """Yields the settings that SFTTrainer would refuse only after the base is loaded.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py
    """
    if training.padding_free and not training.packing and training.max_length is not None:
        yield "padding_free without packing enforces no max_length: set packing, or max_length to null"
    if training.eval_packing is not None and training.eval_packing != training.packing:
        yield f"eval_packing {training.eval_packing}: test rows are packed as training rows are; leave it out"
    kwargs = training.gradient_checkpointing_kwargs or {}
    if isinstance(kwargs, dict) and kwargs.get("selective"):
        if not training.gradient_checkpointing:
            yield "gradient_checkpointing_kwargs: selective needs gradient_checkpointing; set it, or leave this out"
        if kwargs.get("use_reentrant"):
            yield "gradient_checkpointing_kwargs: selective needs use_reentrant to be false"


def common_faults(
    recipe: RecipeArguments, script: ScriptArguments, training: TrainingArguments, model: ModelConfig
) -> Iterator[str]:
    """Yields what is wrong with the settings that both programs have, each with what to do."""
    if not model.model_name_or_path:
        yield "model_name_or_path is missing: give a Hub id or a local folder"
    if not script.dataset_name:
        yield "dataset_name is missing: give a Hub id or a local file"
    refused = refused_values(recipe, script, training, model)
    yield from dict.fromkeys(fault for _, fault in refused)  # several settings may have the same fault
    if not refused:
        yield from _fault_of(check_schedule, training)
    if recipe.method != "lora":
        for name in ADAPTER_SETTINGS:
            if (vars(recipe) | vars(model))[name] not in (None, False):
                yield f"{name} is for an adapter, and method {recipe.method} trains none; leave it out"
    yield from _unsupported(
        {
            "dataset_streaming": (script.dataset_streaming, "rows are checked before training, so all are read first"),
            "ignore_bias_buffers": (script.ignore_bias_buffers, "current Transformers models need no such workaround"),
        }
    )
    yield from _misplaced(recipe, script, model)
    yield from _method_faults(recipe, training, model)
    yield from _fsdp_faults(training)
    if training.save_strategy == "best" and not training.metric_for_best_model:
        yield "save_strategy best needs metric_for_best_model: give one, such as loss"
    yield from _clashing_precisions(recipe, training, model)
    yield from _fault_of(check_writable, training.output_dir)
    for tracker in [training.report_to] if isinstance(training.report_to, str) else training.report_to or []:
        yield from _fault_of(check_tracker, tracker)


def _method_faults(recipe: RecipeArguments, training: TrainingArguments, model: ModelConfig) -> Iterator[str]:
    """Yields the settings that contradict `method`."""
    if recipe.method != "lora" and (model.load_in_4bit or model.load_in_8bit):
        yield f"method {recipe.method} trains the base's own weights, which is not possible in 4 or 8 bits; use lora"
    if recipe.method != "lora" and (engine := sharding_engine(training)):
        yield (
            f"method {recipe.method}: {engine} shards the base's weights, which this method trains; use "
            "accelerate_configs/ddp.yaml, or method lora"
        )
    if recipe.method != "lora" and recipe.merge:
        yield f"merge: method {recipe.method} leaves a whole model, so there is nothing to merge"
    if recipe.last_layers and recipe.method != "last_layers":
        yield f"last_layers belongs to --method last_layers, not {recipe.method}"


def _fsdp_faults(training: TrainingArguments) -> Iterator[str]:
    """Yields the FSDP settings that are not supported; an accelerate config gives them by environment variables."""
    if not asks_for_fsdp() and not training.fsdp:
        return
    if training.world_size == 1:
        yield "fsdp is for several processes, and this is one: start them with accelerate launch, or leave it out"
    given: dict[str, Any] = getattr(training, "fsdp_plugin_args", None) or {}
    if str(given.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))) != "2":
        yield "fsdp: version 1 is not supported; set fsdp_version: 2 in the accelerate config"
    lean = given.get("cpu_ram_efficient_loading", os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"))
    if str(lean).lower() == "true":
        yield (
            "fsdp: cpu_ram_efficient_loading loses adapters, which are not sharded here; set "
            "fsdp_cpu_ram_efficient_loading: false in the accelerate config: every process reads the base itself"
        )


def _unsupported(settings: dict[str, tuple[object, str]]) -> Iterator[str]:
    for name, (is_set, reason) in settings.items():
        if is_set:
            yield f"{name} is not supported: {reason}"


def _unknown_metric(training: TrainingArguments, scores: tuple[str, ...]) -> Iterator[str]:
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in ("loss", *scores):
        yield f"metric_for_best_model: there is no {metric!r}; there are loss, {', '.join(scores)}"


def refused_values(
    recipe: RecipeArguments, script: ScriptArguments, training: TrainingArguments, model: ModelConfig
) -> list[tuple[str, str]]:
    """Settings with a wrong value, whatever the other settings are: the name, and what is wrong and what to do."""
    found = list(_out_of_range(vars(recipe) | vars(script) | vars(training) | vars(model)))
    if not found:  # or a wrong value, such as a learning rate below 0, would be reported as a fault of the optimizer
        found += [("optim", message) for message in _fault_of(check_optimizer, training)]
    if recipe.method == "lora":
        found += adapter_faults(model, recipe)
    found += [("attn_implementation", message) for message in _fault_of(check_attention, model.attn_implementation)]
    options = getattr(training, "model_init_kwargs", None)
    if isinstance(options, dict) and (twice := options.keys() & OWN_FLAGS):
        found.append(("model_init_kwargs", f"model_init_kwargs: {min(twice)} has a flag of its own; set that"))
    if isinstance(options, dict) and "use_safetensors" in options:
        message = "model_init_kwargs: use_safetensors is always true, as no pickle is ever read; leave it out"
        found.append(("model_init_kwargs", message))
    return found


def _out_of_range(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Numbers outside their bounds, `..._kwargs` that are not mappings, and settings that would train nothing."""
    for name, (low, high) in BOUNDS.items():
        value = settings.get(name)
        if value is not None and (not low <= value <= high or value == math.inf):
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            yield name, f"{name} must be {limits}, not {value}"
    for name in BELOW_1:
        value = settings.get(name)
        if value is not None and not 0 <= value < 1:
            yield name, f"{name} must be at least 0 and below 1, not {value}"
    for name, value in settings.items():
        if name.endswith("_kwargs") and isinstance(value, str):
            yield name, f"{name} must be a mapping, as JSON on the command line, not {value!r}"
    yield from _trains_nothing(settings)


def _trains_nothing(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    rate, steps, epochs = (settings[name] for name in ("learning_rate", "max_steps", "num_train_epochs"))
    if not 0 < rate < math.inf:
        yield "learning_rate", f"learning_rate must be above 0, not {rate}"
    if steps == 0:
        yield "max_steps", "max_steps 0 takes no step; give at least 1, or leave it out to go by num_train_epochs"
    elif steps < 0 and epochs == 0:
        yield "num_train_epochs", "num_train_epochs 0 takes no step; give more, or set max_steps"
    if settings.get("method", "lora") == "lora" and settings["lora_alpha"] == 0:
        yield "lora_alpha", "lora_alpha 0 multiplies every adapter by 0, so that it changes nothing; give more"
    if settings["lora_target_modules"] == []:
        yield "lora_target_modules", "lora_target_modules is an empty list; name modules, or leave it out"


def check_optimizer(training: TrainingArguments) -> None:
    """Raises `UserError` if `optim` cannot be made here; Trainer would fail only after the base is loaded."""
    weight: Any = nn.Linear(1, 1, device="meta")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training, weight)
        if not options.keys() & {"params", "model", "optimizer_dict"}:  # made from the parameters given
            kind(weight.parameters(), **{name: value for name, value in options.items() if name != "fused"})
    except ImportError as error:
        raise UserError(f"optim {optim_name(training)}: {first_line(error)}; or choose another") from error
    except Exception as error:  # of many libraries
        if not training.optim_target_modules:  # these name layers of the base, which is not loaded
            reason = first_line(error)
            raise UserError(
                f"optim {optim_name(training)}: it cannot be made here ({reason}); choose another, or fix optim_args"
            ) from error


def check_schedule(training: TrainingArguments) -> None:
    """Raises `UserError` if the learning rate's schedule cannot be made; Trainer would fail when training starts."""
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate),
            num_warmup_steps=training.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=dict(cast(dict[str, Any], training.lr_scheduler_kwargs or {})),
        )
    except (ValueError, TypeError) as error:
        kind = SchedulerType(training.lr_scheduler_type).value
        raise UserError(f"lr_scheduler_type {kind}: {error}; see lr_scheduler_kwargs") from error


def check_attention(name: str | None) -> None:
    """Raises `UserError` if this attention implementation is unknown, or its package is not installed.

    One from the Hub, `owner/name`, is fetched and checked when the base is loaded.
    """
    if name is None or "/" in name:
        return
    tiny = LlamaConfig(vocab_size=1, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(tiny, attn_implementation=name, dtype=torch.bfloat16)
    except (ValueError, ImportError) as error:
        raise unusable_attention(name, error) from error


def unusable_attention(name: str, error: Exception) -> UserError:
    """The error for an attention implementation that is refused."""
    return UserError(
        f"attn_implementation {name!r} cannot be used here ({first_line(error)}); leave it out, or give eager or sdpa"
    )


def _misplaced(recipe: RecipeArguments, script: ScriptArguments, model: ModelConfig) -> Iterator[str]:
    """Settings that apply only to the Hub, given with local files."""
    sources = [getattr(recipe, name, None) for name in ("eval_dataset_name", "validation_dataset_name")]
    if script.dataset_config and all(is_local(name) for name in (script.dataset_name, *sources) if name):
        yield f"dataset_config {script.dataset_config}: local files have no configurations; leave it out"
    name = model.model_name_or_path
    if name and model.model_revision not in (None, "main") and is_local(name):
        yield f"model_revision {model.model_revision}: a local folder has no revisions; leave it out"


def _unpinned_code(name: str, revision: str | None, merge: bool) -> Iterator[str]:
    """Code from the Hub must be pinned to a commit: a branch or a tag may later hold other code."""
    if not is_local(name) and not COMMIT.fullmatch(revision or ""):
        yield (
            f"trust_remote_code runs the code of {name} from the Hub: read it, and give the commit that you have read "
            f"as model_revision, 40 hexadecimal digits, not {revision}"
        )
    if merge:
        yield "merge: a merged model is loaded again without code of its own; leave merge or trust_remote_code out"


def _clashing_precisions(recipe: RecipeArguments, training: TrainingArguments, model: ModelConfig) -> Iterator[str]:
    wholly_trained = recipe.lora_bias != "none" or model.lora_modules_to_save or getattr(recipe, "train_head", False)
    if recipe.adapter_dtype != "float32" and wholly_trained and not training.bf16 and model.dtype != "bfloat16":
        yield (
            f"adapter_dtype {recipe.adapter_dtype}: biases, heads and other modules that are trained whole would not "
            f"fit a base in {model.dtype}; leave it out, or give --bf16 or --dtype bfloat16"
        )
    if recipe.adapter_dtype != "float32" and training.fp16:
        yield (
            f"adapter_dtype {recipe.adapter_dtype}: fp16 scales the loss, and PyTorch unscales float32 gradients "
            "only; leave it out, or give --bf16 true --fp16 false"
        )
    precision = recipe.precision
    if precision == ("fp32" if training.bf16 or training.fp16 else "bf16" if not training.bf16 else None):
        flags = f"bf16 {training.bf16} and fp16 {training.fp16}".lower()
        yield f"precision {precision} contradicts {flags}; leave either out"
    if training.fp16 and trains_on_cpu(training.use_cpu):
        yield "fp16 needs a GPU: leave --fp16 out, and a CPU trains in float32"
    if model.dtype not in ("auto", "float32", "float16", "bfloat16"):
        yield f"dtype must be auto, float32, float16 or bfloat16, not {model.dtype}"


def _fault_of(check: Callable[[Any], None], value: object) -> Iterator[str]:
    """The message of a check, if it raises."""
    try:
        check(value)
    except UserError as error:
        yield str(error)


def check_writable(folder: str | None, option: str = "output_dir") -> None:
    """Raises `UserError` if the folder cannot be created or written to."""
    if not folder:
        raise UserError(f"{option} is empty; give a folder")
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{option} {folder}: {existing} cannot be written to")


def check_tracker(name: str) -> None:
    """Raises `UserError` if `report_to` names a tracker that Transformers does not know, or that is not installed."""
    if name in ("none", "all", *get_available_reporting_integrations()):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise UserError(
            f"report_to: there is no tracker {name!r}; known are none, {', '.join(INTEGRATION_TO_CALLBACK)}"
        )
    if find_spec(name) is None:
        raise UserError(f"report_to: {name} is not installed; pip install {name}, or set --report_to none")
