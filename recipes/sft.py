"""Supervised fine-tuning of a causal language model with LoRA.

accelerate launch --config_file accelerate_configs/single_gpu.yaml \
    recipes/sft.py --config recipes/gpt2-alpaca-gpt4/lora.yaml

The flags are those of TRL's ScriptArguments, SFTConfig and ModelConfig and of
plainlora.settings.arguments.SFTArguments, in the YAML or on the command line. The command line wins, and what
cannot be honoured is refused.
"""

import plainlora.quiet  # noqa: F401, I001  # before the libraries that it quiets

from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from plainlora.backends import BACKENDS, attach_adapter, check_same_adapter, count_parameters
from plainlora.base.config import check_length, check_mergeable, load_config
from plainlora.base.dropout import check_dropout
from plainlora.base.loading import build_decoder, describe_quantization, load_base
from plainlora.base.remote_code import describe_remote_code
from plainlora.base.tokenizer import check_vocabulary, load_tokenizer
from plainlora.data.prompts import install_template
from plainlora.doctor.layers import examine_layers
from plainlora.doctor.learning_rate import examine_learning_rate
from plainlora.doctor.precision import list_precisions, precision_line
from plainlora.doctor.rows import examine_rows
from plainlora.doctor.tokens import examine_template
from plainlora.errors import run_program
from plainlora.generation import ExactMatch
from plainlora.hub.model_card import write_sft_card
from plainlora.hub.pushing import check_push, open_run_repository, push_run
from plainlora.merging.merge import merge_adapter
from plainlora.plots import plot_loss
from plainlora.provenance.base_identity import describe_base
from plainlora.provenance.record import complete_run, write_run
from plainlora.provenance.resumption import check_same_rows, check_same_settings
from plainlora.report import summary, write_json, write_samples
from plainlora.resources.checkpointing import needs_checkpointing
from plainlora.resources.disk import merged_bytes
from plainlora.resources.memory import free_memory, peak_memory, reset_peak_memory
from plainlora.settings.adapter import build_lora_config
from plainlora.settings.programs import SFT
from plainlora.training.checkpoints import resume_path
from plainlora.training.evaluation import Examiner, before_and_after
from plainlora.training.preparation import prepare_rows
from plainlora.training.run_folder import SAMPLES, check_inputs_apart, claim_output_dir, clear_output_dir, lies_in
from plainlora.training.saving import check_room
from plainlora.training.trainers import AdapterTrainer, hand_over


def main() -> None:
    # Everything that can be refused is refused before a weight is loaded or a file is touched.
    recipe, script, training, model_args = SFT.parse()
    say = PartialState().print
    name, revision = model_args.model_name_or_path, model_args.model_revision
    check_push(training, str(name), recipe.hub_base_model)
    inputs = {"base model": name, "dataset": script.dataset_name, "test dataset": recipe.eval_dataset_name}
    check_inputs_apart(training.output_dir, inputs)
    checkpoint = resume_path(training, say)
    claim_output_dir(training.output_dir, recipe.overwrite, resume=checkpoint)
    lora = build_lora_config(model_args, recipe)
    if checkpoint is not None:
        check_same_adapter(checkpoint, lora)
        check_same_settings(checkpoint, (recipe, training, model_args))
    if training.trust_remote_code:
        say(describe_remote_code(name, revision))
    base_config = load_config(name, revision, training.trust_remote_code)
    check_length(training.max_length, base_config)
    check_dropout(recipe.base_dropout, base_config)
    if recipe.merge:
        check_mergeable(name, base_config)
    tokenizer = load_tokenizer(
        name,
        revision,
        eos_token=training.eos_token,
        pad_token=training.pad_token,
        trust_remote_code=training.trust_remote_code,
    )
    check_vocabulary(tokenizer, base_config)
    template, own_template = recipe.prompt_template or training.chat_template_path, tokenizer.chat_template
    install_template(tokenizer, template)
    rows = prepare_rows(recipe, script, training, tokenizer, say)
    if checkpoint is not None:
        check_same_rows(checkpoint, rows.train)
    examination = examine_rows(rows, tokenizer, base_config)
    examine_layers(build_decoder(base_config, training.trust_remote_code), lora, examination)
    examine_template(tokenizer, template, own_template, examination)
    examine_learning_rate(training, examination)
    examination.stop_or_say(say)
    say(precision_line(list_precisions(training, model_args, base_config, recipe.adapter_dtype)))
    exact_match = None
    if recipe.exact_match_rows and rows.raw_test is not None:
        exact_match = ExactMatch(rows.raw_test, recipe.exact_match_rows, tokenizer, recipe.max_new_tokens)

    repository = open_run_repository(training, say) if PartialState().is_main_process else None

    # Seed first, then base, then adapter: the same command gives the same adapter.
    set_seed(training.seed)
    free = free_memory(training.device)
    base = load_base(model_args, training.trust_remote_code, training.model_init_kwargs, recipe.base_dropout)
    quantization = describe_quantization(base)
    backend = BACKENDS[recipe.lora_backend]
    model = attach_adapter(base, lora, backend, recipe.adapter_dtype)
    trainable, total = count_parameters(model)
    say(f"{recipe.lora_backend} LoRA: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    if training.gradient_checkpointing is None:
        longest = training.max_length or max(map(len, rows.train["input_ids"]))
        needed = needs_checkpointing(
            training, base, lora, backend, recipe.adapter_dtype, longest, len(rows.train), free, say
        )
        training.gradient_checkpointing = training.activation_checkpointing = needed

    merged = merged_bytes(total - trainable, base_config, tokenizer) if recipe.merge else 0
    check_room(training, model, False, merged)
    trainer = AdapterTrainer(
        model,
        backend,
        args=hand_over(training),
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=tokenizer,
    )
    examine = Examiner(trainer, tokenizer, exact_match, recipe.sample_prompts, recipe.max_new_tokens)

    output, run = Path(training.output_dir), {}
    if trainer.accelerator.is_main_process:
        identity = describe_base(str(name), revision, training.trust_remote_code)
        if not (checkpoint and lies_in(checkpoint, training.output_dir)):
            clear_output_dir(training.output_dir)
        run = write_run(
            output / "run.json",
            (recipe, script, training, model_args),
            quantization=quantization,
            base=identity,
            rows={"train": rows.train, "test": rows.test},
            model=model,
        )
    trainer.accelerator.wait_for_everyone()
    reset_peak_memory(training.device)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    memory = peak_memory(training.device)
    trainer.save_model()
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        complete_run(output / "run.json", run, trainer.seen.digest, trainer.state.global_step)
    # The base is measured after training, not before: Trainer.evaluate prepares the model for evaluation only, and
    # training would then go on without DistributedDataParallel (transformers#24014).
    with backend.disabled(model):
        before = examine(model, "base")
    after = examine(model, "adapter")

    if trainer.accelerator.is_main_process:
        results = outcome.metrics | memory | before_and_after(before, after)
        results |= {"trainable_params": trainable, "total_params": total}
        results |= {"rows_trained": rows.reports["train"].kept, "rows_read": rows.reports["train"].rows}
        results |= {"exact_match_rows": len(exact_match.questions)} if exact_match else {}
        plot_loss(trainer.state.log_history, before.loss, output / "loss.png")
        samples = list(zip(examine.prompts, before.answers, after.answers, strict=True))
        write_samples(output / SAMPLES, samples)
        # Written before the merge, which may be refused, and again with its figure.
        write_json(output / "all_results.json", results)
        write_sft_card(output, recipe, script, training, model_args, results, samples)
        if recipe.merge:
            results["merge_max_abs_diff"] = merge_adapter(output, output / "merged", overwrite=True).max_abs_diff
            write_json(output / "all_results.json", results)
            write_sft_card(output, recipe, script, training, model_args, results, samples)
        print(summary(results, training.output_dir, samples))
    if repository is not None:
        print(push_run(output, repository, recipe.hub_base_model))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    run_program(main)
