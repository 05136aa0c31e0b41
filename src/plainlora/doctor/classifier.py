"""A recipe of `recipes/classify.py`: its base, texts, tokenizer, and what is trained."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments

from plainlora.backends import BACKENDS
from plainlora.base.classifier import build_skeleton, classifier_config, load_classifier
from plainlora.base.config import context_length
from plainlora.base.loading import loading_options
from plainlora.base.tokenizer import check_ending, check_vocabulary, load_tokenizer
from plainlora.data.encoding import IGNORED
from plainlora.doctor.base import dense, examine_base, examine_weights
from plainlora.doctor.diagnosis import Diagnosis
from plainlora.doctor.finding import Examination
from plainlora.doctor.layers import examine_layers
from plainlora.doctor.learning_rate import examine_learning_rate
from plainlora.doctor.precision import list_precisions
from plainlora.doctor.resources import examine_resources
from plainlora.doctor.sample import split_sample
from plainlora.doctor.texts import examine_texts
from plainlora.methods import build_classifier_lora, find_last_layers
from plainlora.resources.footprint import Footprint, estimate
from plainlora.resources.plan import Plan
from plainlora.settings.arguments import ClassifyArguments, ClassifyConfig
from plainlora.training.preparation import PreparedTexts, prepare_texts, read_texts

Parts = tuple[ClassifyArguments, ScriptArguments, ClassifyConfig, ModelConfig]


def examine_classifier(found: Diagnosis, parts: Parts, say: Callable[[str], None]) -> dict[str, tuple[Any, str]]:
    """Fills the diagnosis; returns what each setting that was left open will be, and why.

    Args:
        found: With the settings examined.
        parts: The program's dataclasses.
        say: Told which stage begins.
    """
    recipe, script, training, model = parts
    examination, name = found.examination, model.model_name_or_path
    say("looking at the base")
    config = examine_base(recipe, model, recipe.max_length, examination, trust=False)
    adapter_dtype = recipe.adapter_dtype if recipe.method == "lora" else None
    found.precisions = list_precisions(training, model, config, adapter_dtype)
    tokenizer, texts = None, None
    if name:
        tokenizer = examination.ask("tokenizer", "there", load_tokenizer, name, model.model_revision)
    if tokenizer is not None and config is not None:
        examination.ask("tokenizer", "vocabulary", check_vocabulary, tokenizer, config)
        examination.ask("tokenizer", "ending", check_ending, tokenizer, config)
    longest = recipe.max_length or (context_length(config) if config is not None else None)
    if script.dataset_name:
        say("reading rows")
        if tokenizer is None:
            read = examination.ask("rows", "there", read_texts, recipe, script, training)
            if read is not None:
                examination.add("note", "rows", "there", f"{read.line()}, but not tokenised: there is no tokenizer")
        else:
            texts = examination.ask(
                "rows", "there", prepare_texts, recipe, script, training, tokenizer, longest, lambda _: None
            )
    if texts is not None and tokenizer is not None:
        say("looking at rows")
        found.reports = texts.reports
        examination.findings += examine_texts(texts, tokenizer, config).findings
        first = texts.train[0]
        found.sample = split_sample(first["input_ids"], [IGNORED] * len(first["input_ids"]), tokenizer)
        found.sample_label = texts.labels[first["labels"]]
    labels = texts.labels if texts is not None else recipe.labels or ["0", "1"]
    if config is not None:
        say("laying out the model")
        trained = _examine_method(parts, labels, tokenizer, examination)
        if trained is not None and texts is not None and tokenizer is not None:
            say("counting memory")
            found.footprint = _count(parts, trained, texts, tokenizer, examination)
    if found.footprint is not None:
        examine_resources(found.footprint, examination)
    said = "of each row the predicted class and the loss are kept, no logits are gathered"
    examination.add("ok", "evaluation", "memory", said)
    return {"max_length": (longest, "the base's positions")} if recipe.max_length is None else {}


@dataclass(frozen=True)
class _Trained:
    """What a method trains: an adapter, or some modules, or, with neither, every weight."""

    config: PretrainedConfig
    lora: LoraConfig | None = None
    modules: list[str] | None = None


def _examine_method(
    parts: Parts, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, examination: Examination
) -> _Trained | None:
    """What will be trained, found on the architecture alone; `None` where there is an error."""
    recipe, _, training, model = parts
    if recipe.method == "lora":
        examine_learning_rate(training, examination)
    subject = "adapter" if recipe.method == "lora" else "method"
    pad = None if tokenizer is None else tokenizer.pad_token_id
    name = str(model.model_name_or_path)
    config = examination.ask(subject, "classes", classifier_config, name, labels, pad, model.model_revision)
    skeleton = None if config is None else examination.ask(subject, "architecture", build_skeleton, config)
    if config is None or skeleton is None or not _examine_weights(parts, config, examination):
        return None
    if recipe.method == "lora":
        lora = examination.ask(subject, "layers", build_classifier_lora, model, recipe, skeleton)
        return _Trained(config, lora) if lora is not None and examine_layers(skeleton, lora, examination) else None
    if recipe.method == "full":
        examination.add("ok", subject, "layers", "every weight is trained")
        return _Trained(config)
    modules = examination.ask(subject, "layers", find_last_layers, skeleton, recipe.last_layers)
    if modules is None:
        return None
    examination.add("ok", subject, "layers", f"trained are {', '.join(modules)}")
    return _Trained(config, modules=modules)


def _examine_weights(parts: Parts, config: PretrainedConfig, examination: Examination) -> bool:
    recipe, _, _, model = parts
    name = str(model.model_name_or_path)

    def load(**options: Any) -> object:
        options |= loading_options(dense(model)) | {"dropout": recipe.base_dropout}
        return load_classifier(copy.deepcopy(config), name, **options)

    return examine_weights(config, load, examination, model)


def _count(
    parts: Parts,
    trained: _Trained,
    texts: PreparedTexts,
    tokenizer: PreTrainedTokenizerBase,
    examination: Examination,
) -> Footprint | None:
    recipe, _, training, model = parts
    lengths = texts.train["length"][:]
    plan = Plan(
        trained.config,
        trained.lora,
        training,
        model,
        longest=max(lengths),
        rows=len(lengths),
        tokens=sum(lengths),
        backend=None if trained.lora is None else BACKENDS[recipe.lora_backend],
        adapter_dtype=recipe.adapter_dtype,
        base_dropout=recipe.base_dropout,
        labels=texts.labels,
        trained_modules=trained.modules,
        merge=recipe.merge,
        tokenizer=tokenizer,
        evaluated=max(len(rows) for rows in texts.splits(recipe.measured_train_rows).values()),
    )
    return examination.ask("resources", "estimate", estimate, plan)
