"""Fine-tuning of a sequence classifier: LoRA, the last layers only, or every weight.

accelerate launch --config_file accelerate_configs/single_gpu.yaml \
    recipes/classify.py --config recipes/distilbert-imdb/lora.yaml

The flags are those of TRL's ScriptArguments and ModelConfig, of Transformers' TrainingArguments and of
plainlora.settings.arguments.ClassifyArguments, in the YAML or on the command line. The command line overrides the
YAML. A setting that cannot be honoured is refused.
"""

import plainlora.quiet  # noqa: F401, I001  # before the libraries that it silences

from accelerate.utils import release_memory
from transformers import set_seed

from plainlora.doctor.stages import Stages, examine_classifier, examine_start
from plainlora.errors import run_program
from plainlora.hub.pushing import check_push, open_run_repository, push_run
from plainlora.merging.merge import merge_adapter
from plainlora.run.run import Run
from plainlora.settings.programs import CLASSIFY
from plainlora.tasks import classify
from plainlora.tasks.summary import merge_figures, merge_summary


def main() -> None:
    # Everything that can be refused is refused before a weight is loaded or a file is touched.
    settings = CLASSIFY.parse()
    run = Run.claim(settings)
    check_push(settings.training, settings.base, settings.recipe.hub_base_model)
    config, tokenizer = classify.read_config(settings), classify.read_tokenizer(settings)
    found = examine_start(settings, config, tokenizer)
    found.stop()
    texts = classify.prepare_rows(settings, tokenizer, config, run.log)
    adapter = classify.plan_adapter(settings, texts.labels, tokenizer.pad_token_id)
    examine_classifier(settings, Stages(config, tokenizer, adapter), texts, found).stop_or_log(run.log)
    classify.check_resumable(run, adapter, texts)
    repository = open_run_repository(settings.training, run.log)

    # The order seed, base with its new head, adapter makes the same command give the same weights.
    set_seed(settings.training.seed)
    model = classify.load_model(settings, adapter, texts, tokenizer, run.log)
    trainer = classify.make_trainer(settings, adapter, model, texts, tokenizer)
    run.begin(model.model, texts.by_split, model.quantization, texts.labels, adapter.parent, adapter.backend)
    metrics = run.train(trainer)
    run.save(trainer)
    results = classify.measure(settings, trainer, model, texts)
    results.figures |= metrics

    is_main = trainer.accelerator.is_main_process
    trainer.end()  # other processes would time out during a long merge
    if is_main:
        classify.report(run, results, adapter)
        print(classify.summarize(run, results), flush=True)
        if settings.recipe.merge:
            del model, trainer
            release_memory()
            results.figures |= merge_figures(merge_adapter(run.folder, run.merged, overwrite=True))
            classify.report(run, results, adapter)  # again, with the merge's figures
            print(merge_summary(results.figures, run.merged))
    if repository is not None:
        print(push_run(run.folder, repository, settings.recipe.hub_base_model))


if __name__ == "__main__":
    run_program(main)
