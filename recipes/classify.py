"""Fine-tuning of a sequence classifier: LoRA, the last layers only, or every weight.

accelerate launch --config_file accelerate_configs/single_gpu.yaml \
    recipes/classify.py --config recipes/distilbert-imdb/lora.yaml

The flags are those of TRL's ScriptArguments and ModelConfig, of Transformers' TrainingArguments and of
plainlora.settings.arguments.ClassifyArguments, in the YAML or on the command line. The command line wins, and what
cannot be honoured is refused.
"""

import plainlora.quiet  # noqa: F401, I001  # before the libraries that it quiets

from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import DataCollatorWithPadding, set_seed

from plainlora.backends import check_same_adapter, count_parameters
from plainlora.base.classifier import build_skeleton, classifier_config, load_classifier
from plainlora.base.config import check_length, check_mergeable, context_length, load_config
from plainlora.base.dropout import check_dropout
from plainlora.base.loading import describe_quantization, loading_options
from plainlora.base.tokenizer import check_ending, check_vocabulary, load_tokenizer
from plainlora.doctor.learning_rate import examine_learning_rate
from plainlora.doctor.precision import list_precisions, precision_line
from plainlora.doctor.texts import examine_texts
from plainlora.errors import run_program
from plainlora.hub.model_card import write_classifier_card
from plainlora.hub.pushing import check_push, open_run_repository, push_run
from plainlora.merging.merge import merge_adapter
from plainlora.methods import (
    build_classifier_lora,
    check_same_method,
    find_last_layers,
    train_adapter,
    train_weights,
)
from plainlora.plots import plot_confusion, plot_loss
from plainlora.provenance.base_identity import describe_base
from plainlora.provenance.record import complete_run, write_run
from plainlora.provenance.resumption import check_same_rows, check_same_settings
from plainlora.report import classifier_summary, write_json
from plainlora.resources.disk import merged_bytes
from plainlora.resources.memory import peak_memory, reset_peak_memory
from plainlora.settings.programs import CLASSIFY
from plainlora.training.checkpoints import resume_path
from plainlora.training.metrics import flatten, judge_rows, measure, score
from plainlora.training.preparation import prepare_texts
from plainlora.training.run_folder import check_inputs_apart, claim_output_dir, clear_output_dir, lies_in
from plainlora.training.saving import check_room
from plainlora.training.trainers import ClassifierTrainer, args_for_trainer


def main() -> None:
    # Everything that can be refused is refused before a weight is loaded or a file is touched.
    recipe, script, training, model_args = CLASSIFY.parse()
    say = PartialState().print
    name, revision = str(model_args.model_name_or_path), model_args.model_revision
    check_push(training, name, recipe.hub_base_model)
    inputs = {"base model": name, "dataset": script.dataset_name, "test dataset": recipe.eval_dataset_name}
    check_inputs_apart(training.output_dir, inputs | {"validation dataset": recipe.validation_dataset_name})
    checkpoint = resume_path(training, say)
    claim_output_dir(training.output_dir, recipe.overwrite, resume=checkpoint)
    base_config = load_config(name, revision)
    check_length(recipe.max_length, base_config)
    check_dropout(recipe.base_dropout, base_config)
    if recipe.merge:
        check_mergeable(name, base_config)
    tokenizer = load_tokenizer(name, revision)
    check_vocabulary(tokenizer, base_config)
    check_ending(tokenizer, base_config)
    texts = prepare_texts(recipe, script, training, tokenizer, recipe.max_length or context_length(base_config), say)
    examination = examine_texts(texts, tokenizer, base_config)
    if recipe.method == "lora":
        examine_learning_rate(training, examination)
    examination.stop_or_say(say)
    config = classifier_config(name, texts.labels, tokenizer.pad_token_id, revision)
    skeleton = build_skeleton(config)
    lora = build_classifier_lora(model_args, recipe, skeleton) if recipe.method == "lora" else None
    last_layers = find_last_layers(skeleton, recipe.last_layers) if recipe.method == "last_layers" else None
    adapter_dtype = recipe.adapter_dtype if recipe.method == "lora" else None
    say(precision_line(list_precisions(training, model_args, base_config, adapter_dtype)))
    if checkpoint is not None:
        check_same_method(checkpoint, recipe.method, texts.labels)
        check_same_settings(checkpoint, (recipe, training, model_args), texts.labels)
        check_same_rows(checkpoint, texts.train)
        if lora is not None:
            check_same_adapter(checkpoint, lora)

    repository = open_run_repository(training, say) if PartialState().is_main_process else None

    # Seed first, then base with its new head, then adapter: the same command gives the same weights.
    set_seed(training.seed)
    base, new_weights = load_classifier(config, name, dropout=recipe.base_dropout, **loading_options(model_args))
    quantization = describe_quantization(base)
    trainee = train_weights(base, last_layers) if lora is None else train_adapter(base, lora, recipe, new_weights)
    trainable, total = count_parameters(trainee.model)
    say(f"{recipe.method}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")

    merged = merged_bytes(total - trainable, base_config, tokenizer) if recipe.merge else 0
    check_room(training, trainee.model, trainee.backend is None, merged)
    trainer = ClassifierTrainer(
        trainee.model,
        trainee.backend,
        args=args_for_trainer(training),
        train_dataset=texts.train,
        eval_dataset=texts.validation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),  # to the longest text of the batch
        compute_metrics=partial(score, classes=len(texts.labels)),
        preprocess_logits_for_metrics=judge_rows,
    )

    output, run = Path(training.output_dir), {}
    if trainer.accelerator.is_main_process:
        identity = describe_base(name, revision)
        if not (checkpoint and lies_in(checkpoint, training.output_dir)):
            clear_output_dir(training.output_dir)
        run = write_run(
            output / "run.json",
            (recipe, script, training, model_args),
            quantization=quantization,
            base=identity,
            rows={"train": texts.train, "validation": texts.validation, "test": texts.test},
            model=trainee.model,
            labels=texts.labels,
        )
    trainer.accelerator.wait_for_everyone()
    reset_peak_memory(training.device)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    memory = peak_memory(training.device)
    trainer.save_model()
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        complete_run(output / "run.json", run, trainer.seen.digest, trainer.state.global_step)
    # Measured after training, the state before included: Trainer.predict prepares the model for evaluation only, and
    # training would then go on without DistributedDataParallel (transformers#24014).
    splits = texts.splits(recipe.measured_train_rows)
    with trainee.disabled():
        before = {split: measure(trainer, rows, len(texts.labels), trained=False) for split, rows in splits.items()}
    after = {split: measure(trainer, rows, len(texts.labels), trained=True) for split, rows in splits.items()}

    if trainer.accelerator.is_main_process:
        results = outcome.metrics | memory | flatten(before, "_base") | flatten(after)
        results |= {f"{split}_rows": len(rows) for split, rows in splits.items()}
        results |= {"method": recipe.method, "labels": texts.labels}
        results |= {"trainable_params": trainable, "total_params": total, "rows_trained": len(texts.train)}
        shown = "test" if "test" in splits else "validation" if "validation" in splits else "training"
        tables = {f"{shown} rows before": before[shown].confusion, "after": after[shown].confusion}
        plot_confusion(texts.labels, tables, output / "confusion.png")
        base_loss = before["validation"].loss if "validation" in before else None
        plot_loss(trainer.state.log_history, base_loss, output / "loss.png", unit="text", rows="validation")
        card = partial(write_classifier_card, output, recipe, script, training, model_args, config, lora)
        # Written before the merge, which may be refused, and again with its figure.
        write_json(output / "all_results.json", results)
        card(results)
        if recipe.merge:
            results["merge_max_abs_diff"] = merge_adapter(output, output / "merged", overwrite=True).max_abs_diff
            write_json(output / "all_results.json", results)
            card(results)
        print(classifier_summary(results, training.output_dir))
    if repository is not None:
        print(push_run(output, repository, recipe.hub_base_model))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    run_program(main)
