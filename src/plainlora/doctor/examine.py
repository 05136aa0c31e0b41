"""Examines a whole recipe, and goes on after errors. No weight is loaded."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from plainlora.base.remote_code import describe_remote_code
from plainlora.data.datasets import is_local
from plainlora.data.encoding import IGNORED
from plainlora.doctor.base import examine_weights
from plainlora.doctor.diagnosis import Diagnosis
from plainlora.doctor.finding import Examination
from plainlora.doctor.resources import examine_resources
from plainlora.doctor.sample import split_sample
from plainlora.doctor.settings import list_settings, read_settings
from plainlora.doctor.stages import Stages, examine_classifier, examine_sft, examine_start
from plainlora.errors import UserError
from plainlora.hub.pushing import check_push
from plainlora.resources.devices import Devices
from plainlora.resources.footprint import estimate
from plainlora.resources.plan import Plan
from plainlora.run.checkpoints import resume_path
from plainlora.run.folder import check_inputs_apart, claim_output_dir, is_run
from plainlora.settings.precision import list_precisions
from plainlora.settings.programs import SFT, ClassifySettings, Settings, SFTSettings, find_program
from plainlora.tasks import classify, sft
from plainlora.tasks.plan import AdapterPlan
from plainlora.tasks.rows import PreparedRows

STAGES = (
    *("reading the settings", "looking at the base", "reading rows", "looking at rows", "building the model"),
    "counting memory",
)
Decided = dict[str, tuple[Any, str]]  # the value of a setting that was left open, and the reason


def examine(
    config: str, flags: Sequence[str], log: Callable[[str], None], devices: Devices | None = None
) -> Diagnosis:
    """Examines a recipe by the stages of its program, and goes on after errors.

    Args:
        config: The recipe's YAML.
        flags: More of the recipe's flags.
        log: Called with the name of each of `STAGES` as it begins.
        devices: The devices that the run is planned for, if not these: the base's config alone is then read.

    Raises:
        UserError: The file is not a YAML mapping.
    """
    log("reading the settings")
    program = find_program(config, flags)
    found = Diagnosis(config, program.name, devices)
    settings = read_settings(program, config, flags, found.examination)
    _examine_folder(settings, found.examination)
    examine_task: Callable[..., Decided] = _examine_sft if program is SFT else _examine_classifier
    decided = found.examination.ask("doctor", "examination", examine_task, found, settings, log)
    found.settings = list_settings(settings, decided or {})
    return found


def _examine_folder(settings: Settings[Any, Any], found: Examination) -> None:
    """Checks the output folder, the checkpoint and the push."""
    training = settings.training
    if training.output_dir:  # an empty one is reported already
        found.ask("settings", "output folder", check_inputs_apart, training.output_dir, settings.inputs)
    passed_over: list[str] = []
    checkpoint = found.ask("settings", "resuming", resume_path, training, passed_over.append)
    for message in passed_over:
        found.add("note", "settings", "resuming", message)
    if training.output_dir:
        _examine_earlier_run(Path(training.output_dir), settings.recipe.overwrite, checkpoint, found)
    base = str(settings.model.model_name_or_path)
    found.ask("settings", "publishing", check_push, training, base, settings.recipe.hub_base_model)


def _examine_earlier_run(folder: Path, overwrite: bool, checkpoint: str | None, found: Examination) -> None:
    """Checks for an earlier run in the folder. If it is replaceable by --overwrite, that is only a warning."""
    try:
        claim_output_dir(folder, overwrite, resume=checkpoint)
    except UserError as error:
        if is_run(folder) and not overwrite:
            found.add("warning", "settings", "output folder", f"a new run needs --overwrite: {error}")
        else:
            found.add("error", "settings", "output folder", str(error))


def _examine_sft(found: Diagnosis, settings: SFTSettings, log: Callable[[str], None]) -> Decided:
    """Fills the diagnosis of a language model's recipe."""
    recipe, script, training, model = settings.parts
    ask, stages, rows = found.examination.ask, Stages(), None
    log("looking at the base")
    if model.model_name_or_path:
        if training.trust_remote_code and (
            message := ask("base", "code", describe_remote_code, settings.base, model.model_revision)
        ):
            found.examination.add("warning", "base", "code", message)
        stages.config = ask("base", "config", sft.read_config, settings)
        stages.tokenizer = _read_tokenizer(sft.read_tokenizer, settings, stages.config, found.examination)
    if stages.tokenizer is not None:
        stages.own_template = stages.tokenizer.chat_template
        if not found.examination.passes("tokenizer", "template", sft.install_template, settings, stages.tokenizer):
            stages.tokenizer = None
    if script.dataset_name:
        log("reading rows")
        if stages.tokenizer is None:
            _note_untokenised(ask("rows", "reading", sft.read_rows, settings), found.examination)
        else:
            rows = ask("rows", "reading", sft.prepare_rows, settings, stages.tokenizer, _silent)
    log("looking at rows")
    if stages.config is not None:
        subject, check = ("adapter", "config") if recipe.method == "lora" else ("method", "layers")
        stages.adapter = ask(subject, check, sft.plan_adapter, settings, stages.config)
    examine_start(settings, stages.config, stages.tokenizer, found.examination)
    examine_sft(settings, stages, rows, found.examination)
    adapter_dtype = recipe.adapter_dtype if recipe.method == "lora" else None
    found.precisions = list_precisions(training, model, stages.config, adapter_dtype)
    if rows is not None and stages.tokenizer is not None:
        found.reports = rows.reports
        if len(rows.train):
            first = rows.train[0]
            found.sample = split_sample(first["input_ids"], first["labels"], stages.tokenizer)
    log("building the model")
    loads = stages.config is not None and _examine_weights(found, settings, stages.config, sft.load_weights)
    if loads and stages.adapter is not None and stages.tokenizer is not None and rows is not None and len(rows.train):
        log("counting memory")
        _count(found, partial(sft.plan_run, settings, stages.adapter, stages.tokenizer, rows))
    found.examination.add("ok", "evaluation", "memory", "an evaluation keeps only the loss; no logits are gathered")
    return _decided(settings, found, rows) | _chosen(settings, stages.adapter)


def _examine_classifier(found: Diagnosis, settings: ClassifySettings, log: Callable[[str], None]) -> Decided:
    """Fills the diagnosis of a classifier's recipe."""
    recipe, script, training, model = settings.parts
    ask, stages, texts = found.examination.ask, Stages(), None
    log("looking at the base")
    if model.model_name_or_path:
        stages.config = ask("base", "config", classify.read_config, settings)
        stages.tokenizer = _read_tokenizer(classify.read_tokenizer, settings, stages.config, found.examination)
    if script.dataset_name:
        log("reading rows")
        if stages.tokenizer is None:
            read = ask("rows", "reading", classify.read_rows, settings)
            if read is not None:
                message = f"{read.line()}, but not tokenised: there is no tokenizer"
                found.examination.add("note", "rows", "reading", message)
        else:
            texts = ask("rows", "reading", classify.prepare_rows, settings, stages.tokenizer, stages.config, _silent)
    log("looking at rows")
    labels = texts.labels if texts is not None else recipe.labels or ["0", "1"]
    if stages.config is not None:
        subject = "adapter" if recipe.method == "lora" else "method"
        pad = None if stages.tokenizer is None else stages.tokenizer.pad_token_id
        stages.adapter = ask(subject, "layers", classify.plan_adapter, settings, labels, pad)
    examine_start(settings, stages.config, stages.tokenizer, found.examination)
    examine_classifier(settings, stages, texts, found.examination)
    adapter_dtype = recipe.adapter_dtype if recipe.method == "lora" else None
    found.precisions = list_precisions(training, model, stages.config, adapter_dtype)
    if texts is not None and stages.tokenizer is not None:
        found.reports = texts.reports
        first = texts.train[0]
        found.sample = split_sample(first["input_ids"], [IGNORED] * len(first["input_ids"]), stages.tokenizer)
        found.sample_label = texts.labels[first["labels"]]
    if stages.adapter is not None:
        log("building the model")
        config = stages.adapter.config
        load = partial(classify.load_weights, config=config)
        loads = _examine_weights(found, settings, config, load)
        if loads and texts is not None and stages.tokenizer is not None:
            log("counting memory")
            _count(found, partial(classify.plan_run, settings, stages.adapter, stages.tokenizer, texts))
    message = "an evaluation keeps each row's predicted class and loss; no logits are gathered"
    found.examination.add("ok", "evaluation", "memory", message)
    longest = classify.longest_text(settings, stages.config)
    decided: Decided = {"max_length": (longest, "the base's positions")} if recipe.max_length is None else {}
    return decided | _chosen(settings, stages.adapter)


def _read_tokenizer(
    read: Callable[..., PreTrainedTokenizerBase],
    settings: Settings[Any, Any],
    config: PretrainedConfig | None,
    found: Examination,
) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer. If the Hub did not give the config, it is not asked again: a refusal takes long."""
    if config is None and not is_local(settings.base):
        found.add("error", "tokenizer", "loading", "not looked for, because the base's config could not be loaded")
        return None
    return found.ask("tokenizer", "loading", read, settings)


def _examine_weights(
    found: Diagnosis, settings: Settings[Any, Any], config: PretrainedConfig, load: Callable[..., object]
) -> bool:
    """Whether the program can load the base; assumed if the run is planned for other devices."""
    if found.planned_for is None:
        return examine_weights(settings, config, load, found.examination)
    found.examination.add("note", "base", "loading", "planned from the config alone; the weights are not checked")
    return True


def _silent(line: str) -> None:
    """Ignores the lines that a program prints about its rows: the diagnosis has them."""


def _count(found: Diagnosis, make_plan: Callable[[], Plan]) -> None:
    """Estimates memory, disk space and time, unless there are errors in the adapter."""
    if any(finding.subject in ("adapter", "method") for finding in found.examination.at("error")):
        return
    ask = found.examination.ask
    if found.planned_for is not None and found.precisions["compute"] == "float32":
        message = "counted in float32, as above; for GPUs with bfloat16 add -- --precision bf16 --dtype auto"
        found.examination.add("note", "resources", "formats", message)
    found.footprint = ask("resources", "estimate", lambda: estimate(make_plan(), found.planned_for))
    if found.footprint is not None:
        examine_resources(found.footprint, found.examination)


def _note_untokenised(read: tuple[Dataset, Dataset | None] | None, found: Examination) -> None:
    """Notes the numbers of rows that could not be tokenised."""
    if read is not None:
        train, test = read
        message = f"{len(train):,} to train on and {len(test) if test is not None else 0:,} to test on were read"
        found.add("note", "rows", "reading", f"{message}, but not tokenised: there is no tokenizer, or no template")


def _chosen(settings: Settings[Any, Any], adapter: AdapterPlan | None) -> Decided:
    """The adapter's back end, if it is another than the settings ask for."""
    if adapter is None or adapter.backend in (None, settings.recipe.lora_backend):
        return {}
    return {"lora_backend": (adapter.backend, "PEFT alone implements this adapter")}


def _decided(settings: SFTSettings, found: Diagnosis, rows: PreparedRows | None) -> Decided:
    """The value of each setting that was left open, and the reason."""
    recipe, _, training, model = settings.parts
    decided: Decided = {}
    if recipe.prompt_template is None:
        template = training.chat_template_path or "the tokenizer's own"
        unused = rows is not None and not rows.rendered
        decided["prompt_template"] = ("none" if unused else template, "plain texts" if unused else "left open")
    if training.gradient_checkpointing is None:
        decided["gradient_checkpointing"] = ("only if a step would not fit", "counted at the start")
        if found.footprint is not None:
            checkpointing = found.footprint.memory.checkpointing
            decided["gradient_checkpointing"] = (checkpointing, "by what fits; counted again at the start")
    if training.completion_only_loss is None and rows is not None:
        decided["completion_only_loss"] = (rows.answers_only, "by the rows' columns")
    layers = [finding.figures["layers"] for finding in found.examination.findings if "layers" in finding.figures]
    if model.lora_target_modules is None and layers:
        decided["lora_target_modules"] = (list(layers[0]), "PEFT's choice for this architecture")
    return decided
