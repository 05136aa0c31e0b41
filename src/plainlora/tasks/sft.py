"""Supervised fine-tuning of a causal language model, stage by stage.

    settings -> config, tokenizer -> adapter -> rows -> model -> trainer -> results

`recipes/sft.py` calls the stages in this order; `plainlora doctor` calls those that need no weights, `plainlora
compare` those that it compares. A stage raises if it has no result. Whether the result should be trained on is checked
by `plainlora.doctor`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from plainlora.backends import BACKENDS, attach_adapter, count_parameters
from plainlora.base.config import load_config
from plainlora.base.loading import build_decoder, describe_quantization, load_base
from plainlora.base.remote_code import describe_remote_code
from plainlora.base.tokenizer import load_tokenizer
from plainlora.data import prompts
from plainlora.errors import UserError
from plainlora.generation import ExactMatch, check_prompts
from plainlora.hub.model_card import write_sft_card
from plainlora.peft_model.config import needs_rows
from plainlora.plots import plot_loss
from plainlora.report import Sample, write_json, write_samples
from plainlora.resources.checkpointing import needs_checkpointing
from plainlora.resources.memory import free_memory
from plainlora.resources.plan import Plan
from plainlora.run.folder import SAMPLES
from plainlora.run.resumption import check_same_settings
from plainlora.run.run import Run
from plainlora.settings.adapter import build_lora_config
from plainlora.settings.precision import list_precisions, precision_line
from plainlora.settings.programs import SFTSettings
from plainlora.tasks import rows as data
from plainlora.tasks.calibration import calibration_batches
from plainlora.tasks.last_layers import find_last_layers, language_head
from plainlora.tasks.modes import check_dense, check_same_method, train_weights
from plainlora.tasks.plan import AdapterPlan, TrainableModel, check_room, load_parent, plan_lora
from plainlora.tasks.rows import PreparedRows
from plainlora.tasks.summary import summary
from plainlora.training.early_stopping import early_stopping
from plainlora.training.evaluation import Evaluator, before_and_after
from plainlora.training.samples import SamplesByStep
from plainlora.training.trainers import AdapterTrainer, args_for_sft

read_rows = data.read_rows
prepare_rows = data.prepare_rows


def read_config(settings: SFTSettings, log: Callable[[str], None] | None = None) -> PretrainedConfig:
    """The base's config.

    Args:
        settings: The base.
        log: Called, if given, with a line about the base's own code before it runs.

    Raises:
        UserError: It cannot be loaded.
    """
    if settings.training.trust_remote_code and log is not None:
        log(describe_remote_code(settings.base, settings.model.model_revision))
    return load_config(settings.base, settings.model.model_revision, settings.training.trust_remote_code)


def read_tokenizer(settings: SFTSettings) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the EOS and the pad token of the settings.

    Raises:
        UserError: It cannot be loaded.
    """
    training = settings.training
    return load_tokenizer(
        settings.base,
        settings.model.model_revision,
        eos_token=training.eos_token,
        pad_token=training.pad_token,
        trust_remote_code=training.trust_remote_code,
    )


def template_name(settings: SFTSettings) -> str | None:
    """The chat template that replaces the tokenizer's own, if any."""
    return settings.recipe.prompt_template or settings.training.chat_template_path


def install_template(settings: SFTSettings, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str] | None:
    """Installs the settings' chat template.

    Returns:
        The tokenizer's own template, if it had one.

    Raises:
        UserError: There is no such template, or it is not valid.
    """
    own = cast("str | dict[str, str] | None", tokenizer.chat_template)
    prompts.install_template(tokenizer, template_name(settings))
    return own


def plan_adapter(settings: SFTSettings, config: PretrainedConfig) -> AdapterPlan:
    """Resolves what is trained, by the finetuning mode: an adapter, some modules, or every weight.

    Raises:
        UserError: The settings describe no adapter, or the base has no such layers.
        LoRAError: The back end does not implement the adapter.
    """
    recipe = settings.recipe
    check_dense(settings.base, config, recipe.method)
    build = partial(build_decoder, config, settings.training.trust_remote_code)
    if recipe.method == "lora":
        return plan_lora(settings, config, build, build_lora_config(settings.model, recipe))
    modules = _last_layers(settings, build()) if recipe.method == "last_layers" else None
    return AdapterPlan(config, build, None, modules=modules)


def _last_layers(settings: SFTSettings, skeleton: PreTrainedModel | None) -> list[str]:
    if skeleton is None:
        raise UserError(f"last_layers: {settings.base} cannot be built without its weights; use method lora or full")
    return find_last_layers(skeleton, settings.recipe.last_layers or ["1"], language_head)


def check_resumable(run: Run, adapter: AdapterPlan, rows: PreparedRows) -> None:
    """Checks that the run continues the one of its checkpoint, if it has one.

    Raises:
        UserError: The finetuning mode, the adapter, the settings or the rows differ.
    """
    if run.checkpoint is not None:
        check_same_method(run.checkpoint, run.settings.recipe.method)
        if adapter.lora is None:
            check_same_settings(run.checkpoint, run.settings.parts)
    run.check_resumable(rows.train, adapter.lora)


def plan_run(
    settings: SFTSettings, adapter: AdapterPlan, tokenizer: PreTrainedTokenizerBase, rows: PreparedRows
) -> Plan:
    """The figures of the run on which memory, disk space and time depend."""
    recipe, _, training, model = settings.parts
    report = rows.reports["train"]
    packed = training.max_length if training.packing else None
    return Plan(
        adapter.config,
        adapter.lora,
        training,
        model,
        longest=packed or max(map(len, rows.train["input_ids"])),
        rows=report.kept,
        tokens=report.tokens,
        trained_tokens=report.trained_tokens,
        backend=None if adapter.backend is None else BACKENDS[adapter.backend],
        adapter_dtype=recipe.adapter_dtype,
        base_dropout=recipe.base_dropout,
        trained_modules=adapter.modules,
        merge=recipe.merge,
        tokenizer=tokenizer,
        evaluated=0 if rows.test is None else len(rows.test),
        longest_evaluated=packed if rows.test is None else packed or max(map(len, rows.test["input_ids"]), default=1),
    )


def choose_questions(
    settings: SFTSettings, rows: PreparedRows, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> ExactMatch | None:
    """The test rows for exact matches, if any; they and the sample prompts are checked.

    Raises:
        UserError: The rows have no separate answers, or a prompt is empty or fills the model's context.
    """
    count = settings.recipe.exact_match_rows
    questions = None
    if count and rows.raw_test is not None:
        questions = ExactMatch(rows.raw_test, count, tokenizer, settings.training.dataset_text_field)
    sampled = [prompts.render_prompt(each, tokenizer) for each in settings.recipe.sample_prompts]
    check_prompts("sample_prompts", sampled, tokenizer, config)
    check_prompts("exact_match_rows", questions.prompts if questions else [], tokenizer, config)
    return questions


def load_weights(settings: SFTSettings, **options: Any) -> PreTrainedModel:
    """Loads the base.

    Args:
        settings: The base, and how it is stored.
        **options: For `from_pretrained`, in addition to `model_init_kwargs`.

    Raises:
        UserError: It cannot be loaded.
    """
    recipe, _, training, model = settings.parts
    given = cast(dict[str, Any], training.model_init_kwargs or {}) | options
    return load_base(model, training.trust_remote_code, given, recipe.base_dropout, training.device)


def load_model(
    settings: SFTSettings,
    adapter: AdapterPlan,
    rows: PreparedRows,
    tokenizer: PreTrainedTokenizerBase,
    log: Callable[[str], None],
) -> TrainableModel:
    """Loads the base and attaches the adapter, or makes its own weights trainable.

    Decides on gradient checkpointing first, if the settings do not.

    Args:
        settings: The base, how it is stored, and the back end.
        adapter: From `plan_adapter`.
        rows: From `prepare_rows`; EVA, CorDA and LoRA-GA compute the adapter's initial values from them.
        tokenizer: From `read_tokenizer`.
        log: Called with lines on number formats, trained parameters, and gradient checkpointing.

    Raises:
        UserError: The base cannot be loaded, or the adapter does not fit it.
        LoRAError: The adapter does not fit the base.
    """
    recipe, _, training, model_args = settings.parts
    adapter_dtype = recipe.adapter_dtype if adapter.lora is not None else None
    log(precision_line(list_precisions(training, model_args, adapter.config, adapter_dtype)))
    if training.gradient_checkpointing is None:
        plan = plan_run(settings, adapter, tokenizer, rows)
        needed = needs_checkpointing(plan, free_memory(training.device), log)
        training.gradient_checkpointing = training.activation_checkpointing = needed
    base = load_weights(settings)
    for note in adapter.notes:
        log(note)
    if adapter.lora is None or adapter.backend is None:
        trained = train_weights(base, adapter.modules)
    else:
        batches = list(calibration_batches(rows.train, tokenizer, training)) if needs_rows(adapter.lora) else []
        backend, quantization = BACKENDS[adapter.backend], describe_quantization(base)
        model = attach_adapter(base, adapter.lora, backend, recipe.adapter_dtype, batches=batches)
        load_parent(adapter, backend, model)
        trained = TrainableModel(model, backend, partial(backend.disabled, model), quantization)
    what = recipe.method if adapter.backend is None else f"{adapter.backend} LoRA"
    trainable, total = count_parameters(trained.model)
    log(f"{what}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    return trained


def make_trainer(
    settings: SFTSettings,
    adapter: AdapterPlan,
    model: TrainableModel,
    rows: PreparedRows,
    tokenizer: PreTrainedTokenizerBase,
) -> AdapterTrainer:
    """Makes the `AdapterTrainer`.

    Raises:
        UserError: The model cannot be trained on rows batched in this way, or the output does not fit on the disk.
    """
    check_room(settings, adapter, model, tokenizer)
    return AdapterTrainer(
        model.model,
        model.backend,
        args=args_for_sft(settings.training),
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=tokenizer,
        loraplus_lr_ratio=settings.recipe.loraplus_lr_ratio,
        callbacks=early_stopping(settings.recipe.early_stopping_patience),
    )


def sample_by_step(
    settings: SFTSettings,
    trainer: AdapterTrainer,
    model: TrainableModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: ExactMatch | None,
    folder: Path,
) -> SamplesByStep | None:
    """Makes the trainer answer the sample prompts every `sample_steps`, into the run's folder, if that is set."""
    recipe = settings.recipe
    if recipe.sample_steps is None:
        return None
    evaluate = Evaluator(trainer, tokenizer, questions, recipe.sample_prompts, recipe.max_new_tokens)
    samples = SamplesByStep(evaluate, model.model, model.disabled, recipe.sample_steps, folder / SAMPLES)
    trainer.add_callback(samples)
    return samples


@dataclass
class Results:
    """The results of a run.

    Attributes:
        figures: The content of `all_results.json`.
        samples: Prompts with the answers before and after training.
        history: The trainer's log.
        base_loss: Test loss of the base, in nats per token.
        steps: The answers during training, see `SamplesByStep.answers`.
    """

    figures: dict[str, Any]
    samples: list[Sample]
    history: list[dict[str, float]]
    base_loss: float | None
    steps: dict[str, list[str]]


def measure(
    settings: SFTSettings,
    trainer: AdapterTrainer,
    model: TrainableModel,
    rows: PreparedRows,
    tokenizer: PreTrainedTokenizerBase,
    questions: ExactMatch | None,
    samples: SamplesByStep | None = None,
) -> Results:
    """Measures test loss, exact matches and answers before and after training. To be called in every process.

    The base is measured after training, because an earlier Trainer.evaluate would prepare the model for evaluation
    only, and training would then run without DistributedDataParallel (transformers#24014).
    """
    recipe = settings.recipe
    evaluate = Evaluator(trainer, tokenizer, questions, recipe.sample_prompts, recipe.max_new_tokens)
    with model.disabled():
        before = evaluate(model.model, "base")
    after = evaluate(model.model, "adapter")
    trainable, total = count_parameters(model.model)
    report = rows.reports["train"]
    figures = before_and_after(before, after, suffix="" if model.backend is None else "_adapter")
    figures |= {"method": recipe.method, "trainable_params": trainable, "total_params": total}
    figures |= {"rows_trained": report.kept, "rows_read": report.rows}
    figures |= {"exact_match_rows": len(questions.questions)} if questions else {}
    answers = list(zip(evaluate.prompts, before.answers, after.answers, strict=True))
    return Results(figures, answers, trainer.state.log_history, before.loss, samples.answers if samples else {})


def report(run: Run, results: Results, adapter: AdapterPlan) -> None:
    """Writes figures, loss plot, answers and model card to the run's folder."""
    plot_loss(results.history, results.base_loss, run.folder / "loss.png")
    trained = "adapter" if results.figures["method"] == "lora" else "tuned"
    write_samples(run.folder / SAMPLES, results.samples, trained, results.steps)
    write_json(run.folder / "all_results.json", results.figures)
    write_sft_card(run.folder, run.settings, results.figures, results.samples, adapter.backend)


def summarize(run: Run, results: Results) -> str:
    """The summary of a run for the terminal."""
    return summary(results.figures, str(run.folder), results.samples)
