"""Supervised fine-tuning of a causal language model: LoRA, the last layers only, or every weight.

accelerate launch --config_file accelerate_configs/single_gpu.yaml \
    recipes/sft.py --config recipes/gpt2-alpaca-gpt4/lora.yaml

The flags are those of TRL's ScriptArguments, SFTConfig and ModelConfig and of
plainlora.settings.arguments.SFTArguments, in the YAML or on the command line. The command line overrides the YAML. A
setting that cannot be honoured is refused.
"""

import plainlora.quiet  # noqa: F401, I001  # before the libraries that it silences

from accelerate.utils import release_memory
from transformers import set_seed

from plainlora.doctor.stages import Stages, examine_sft, examine_start
from plainlora.errors import run_program
from plainlora.hub.pushing import check_push, open_run_repository, push_run
from plainlora.merging.merge import merge_adapter
from plainlora.run.run import Run
from plainlora.settings.programs import SFT
from plainlora.tasks import sft
from plainlora.tasks.summary import merge_figures, merge_summary


def main() -> None:
    # Everything that can be refused is refused before a weight is loaded or a file is touched.
    settings = SFT.parse()
    run = Run.claim(settings)
    check_push(settings.training, settings.base, settings.recipe.hub_base_model)
    config, tokenizer = sft.read_config(settings, run.log), sft.read_tokenizer(settings)
    found = examine_start(settings, config, tokenizer)
    found.stop()
    own_template = sft.install_template(settings, tokenizer)
    adapter = sft.plan_adapter(settings, config)
    rows = sft.prepare_rows(settings, tokenizer, run.log)
    examine_sft(settings, Stages(config, tokenizer, adapter, own_template), rows, found).stop_or_log(run.log)
    sft.check_resumable(run, adapter, rows)
    questions = sft.choose_questions(settings, rows, tokenizer, config)
    repository = open_run_repository(settings.training, run.log)

    # The order seed, base, adapter makes the same command give the same adapter.
    set_seed(settings.training.seed)
    model = sft.load_model(settings, adapter, rows, tokenizer, run.log)
    trainer = sft.make_trainer(settings, adapter, model, rows, tokenizer)
    samples = sft.sample_by_step(settings, trainer, model, tokenizer, questions, run.folder)
    run.begin(model.model, rows.by_split, model.quantization, parent=adapter.parent, backend=adapter.backend)
    metrics = run.train(trainer)
    run.save(trainer)
    results = sft.measure(settings, trainer, model, rows, tokenizer, questions, samples)
    results.figures |= metrics

    is_main = trainer.accelerator.is_main_process
    trainer.end()  # other processes would time out during a long merge
    if is_main:
        sft.report(run, results, adapter)
        print(sft.summarize(run, results), flush=True)
        if settings.recipe.merge:
            del model, trainer
            release_memory()
            results.figures |= merge_figures(merge_adapter(run.folder, run.merged, overwrite=True))
            sft.report(run, results, adapter)  # again, with the merge's figures
            print(merge_summary(results.figures, run.merged))
    if repository is not None:
        print(push_run(run.folder, repository, settings.recipe.hub_base_model))


if __name__ == "__main__":
    run_program(main)
