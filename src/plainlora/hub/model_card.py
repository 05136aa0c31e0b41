"""The model card: `README.md` in the Hub's format, with metadata, settings, results, and how to load the weights."""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PretrainedConfig, SchedulerType, TrainingArguments
from trl import ModelConfig, SFTConfig

from plainlora.base.classifier import is_classifier
from plainlora.base.config import class_names
from plainlora.data.datasets import hub_name, is_local
from plainlora.lora.config import BOOKKEEPING_FIELDS, find_unsupported
from plainlora.lora.interchange import read_config
from plainlora.markdown import table
from plainlora.report import Sample, describe_samples
from plainlora.run.folder import PICTURES
from plainlora.settings.adapter import build_lora_config
from plainlora.settings.arguments import RecipeArguments, SFTArguments
from plainlora.settings.programs import ClassifySettings, SFTSettings

HERE = "PATH OR HUB ID OF THIS MODEL"  # in loading examples until the model is published

# Figures of quality, and the numbers of rows. Figures of cost are only in all_results.json.
QUALITY = re.compile("loss|perplexity|accuracy|f1|exact_match|_rows$")

TOLD = {"r", "lora_alpha", "lora_dropout", "target_modules", "task_type"}  # fields with a row or sentence of their own
LONGEST = 100  # characters of a field's value


def _show(value: Any) -> str:
    if isinstance(value, bool):  # a subclass of int
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _table(values: dict[str, Any]) -> str:
    return table(["", ""], [(name, _show(value)) for name, value in values.items() if value is not None])


def _results_table(values: dict[str, Any]) -> str:
    """A row for each figure: of the base before training, where it was measured, and of the result."""
    names = dict.fromkeys(name.removesuffix("_base").removesuffix("_adapter") for name in values)
    rows = [(name, values.get(f"{name}_base"), values.get(f"{name}_adapter", values.get(name))) for name in names]
    return table(
        ["", "before", "after"], [[name, *("" if v is None else _show(v) for v in both)] for name, *both in rows]
    )


def _base_weights(model: ModelConfig) -> str | None:
    """How the base was stored in training."""
    if model.load_in_4bit:
        return f"4-bit {model.bnb_4bit_quant_type}"
    return "8-bit" if model.load_in_8bit else model.dtype


def _template_sentence(output_dir: str | Path, recipe: SFTArguments, training: SFTConfig) -> str:
    """A sentence about the chat template, if there is one. It is not applied to rows of plain text."""
    if not (Path(output_dir) / "chat_template.jinja").is_file():
        return "Prompts are plain text: its tokenizer has no chat template."
    template = recipe.prompt_template or training.chat_template_path
    name = f"the template `{template}`" if template else "the base tokenizer's own template"
    return f"Conversations are rendered by {name} (`chat_template.jinja`)."


def _metadata(library: str, task: str, tags: Sequence[str], base: str, dataset: str = "") -> str:
    lines = [f"library_name: {library}", f"pipeline_tag: {task}", f"tags: [{', '.join(tags)}]"]
    if not is_local(base):  # the Hub refuses a path here (transformers#33922)
        lines.append(f"base_model: {base}")
    if hub_name(dataset):
        lines.append(f"datasets: [{dataset}]")
    return "\n".join(lines)


def describe_merge(results: dict[str, Any]) -> str:
    """How far a merged model's logits are from the adapter model's, in the words of `plainlora merge`."""
    return (
        f"{results['merge_max_abs_diff']:.1e}, {results['merge_relative_diff']:.1e} of the largest "
        f"(allowed: {results['merge_tolerance']:.0e})"
    )


def _adapter_settings(backend: str, recipe: RecipeArguments, saved: LoraConfig, trained: LoraConfig) -> dict[str, Any]:
    """The adapter's settings as they are saved: every field of its config that is not PEFT's default.

    A pattern of target modules, saved as the names that it matched, stands as it was given. A converted adapter has
    twice the rank that was trained, see `plainlora.peft_model.model.for_unchanged_base`.
    """
    converted = saved.init_lora_weights != trained.init_lora_weights
    plain = LoraConfig()
    targets = trained.target_modules if isinstance(trained.target_modules, str) else saved.target_modules

    def show(name: str) -> str:
        value, before = (_shortened(_show(getattr(config, name))) for config in (saved, trained))
        return f"{value}, trained as {before}" if converted and value != before else value

    settings = {
        "LoRA back end": backend,
        "r": show("r"),
        "alpha": show("lora_alpha"),
        "dropout": saved.lora_dropout,
        "target modules": targets if isinstance(targets, str) else ", ".join(sorted(targets or ())),
    }
    for name in (field.name for field in fields(LoraConfig) if field.name not in TOLD | BOOKKEEPING_FIELDS):
        value = getattr(saved, name)
        if value != getattr(plain, name) and value not in (None, [], {}, set()):
            settings[name] = show(name)
    if converted:
        settings["init_lora_weights"] = f"{trained.init_lora_weights}, converted for the unchanged base"
    return settings | {"LoRA+ ratio": recipe.loraplus_lr_ratio}


def _training_settings(training: TrainingArguments, results: dict[str, Any]) -> dict[str, Any]:
    used, read = results.get("rows_trained"), results.get("rows_read")
    trained, total = results["trainable_params"], results["total_params"]
    return {
        "rows trained on": used if read is None else f"{used:,} of {read:,} read",
        "trained parameters": f"{trained:,} of {total:,} ({trained / total:.2%})",
        "learning rate": training.learning_rate,
        "schedule": SchedulerType(training.lr_scheduler_type).value,
        "epochs": training.num_train_epochs if training.max_steps <= 0 else None,
        "steps": training.max_steps if training.max_steps > 0 else None,  # it overrides the epochs
        "batch size": training.per_device_train_batch_size * training.world_size,
        "gradient accumulation": training.gradient_accumulation_steps,
        "seed": training.seed,
    }


def _pipeline_loading(task: str) -> str:
    return f"""```python
from transformers import pipeline

model = pipeline("{task}", "{HERE}")
```
"""


def plain_card(folder: str | Path, library: str, task: str, base: str, figures: dict[str, Any]) -> str:
    """The card of weights without one, such as a merged model's.

    Args:
        folder: The folder of the weights; its name is the title.
        library: `peft` for an adapter, `transformers` for a whole model.
        task: The Hub's pipeline tag, `text-generation` or `text-classification`.
        base: Hub id of the base.
        figures: Figures by name; may be empty.

    Returns:
        The text of a `README.md`.
    """
    load = _pipeline_loading(task)
    if library == "peft":
        auto_class = f"AutoPeftModelFor{'SequenceClassification' if task == 'text-classification' else 'CausalLM'}"
        load = f"""```python
from peft import {auto_class}

model = {auto_class}.from_pretrained("{HERE}")
```
"""
    kind = "A LoRA adapter for" if library == "peft" else "A model made from"
    table = f"\n## Figures\n\n{_table(figures)}\n" if figures else ""
    return f"""---
{_metadata(library, task, ("lora", "plainlora"), base)}
---

# {Path(folder).resolve().name}

{kind} `{base}`, published with PlainLoRA.
{table}
## Loading

{load}"""


def _write(
    output_dir: str | Path,
    metadata: str,
    introduction: str,
    results: dict[str, Any],
    settings: dict[str, Any],
    load: str,
    samples: Sequence[Sample] = (),
    trained: str = "adapter",
) -> None:
    pictures = "\n".join(
        f"![{name.partition('.')[0]}]({name})" for name in PICTURES if (Path(output_dir) / name).is_file()
    )
    quality = {
        name: value for name, value in results.items() if QUALITY.search(name) and not isinstance(value, (list, dict))
    }
    if "merge_max_abs_diff" in results:
        quality["logits of the merged model differ by at most"] = describe_merge(results)
    answers = f"## Sample answers\n\n{describe_samples(samples, trained)}\n" if samples else ""
    text = f"""---
{metadata}
---

# {Path(output_dir).name}

{introduction}

## Results

{_results_table(quality)}

{answers}## Loading

{load}
## Training

{pictures}

<details><summary>Settings</summary>

{_table(settings)}

</details>
"""
    (Path(output_dir) / "README.md").write_text(text, encoding="utf-8")


def _quoted(base: str, revision: str | None) -> str:
    """The arguments of `from_pretrained` for a base."""
    return f'"{base}"' + (f', revision="{revision}"' if revision not in (None, "main") else "")


def _loading_by_hand(base: str) -> str:
    return f"""
With PlainLoRA, from a local folder:

```python
from plainlora import load_adapter
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = load_adapter(base, "PATH OF THIS ADAPTER")
```
"""


def _parent_sentence(name: str | None) -> str:
    """A sentence about the adapter that was trained further. A folder of this machine is not named."""
    if name is None:
        return ""
    return " It goes on from " + ("an earlier adapter." if Path(name).expanduser().exists() else f"`{name}`.")


def write_sft_card(
    output_dir: str | Path,
    run: SFTSettings,
    results: dict[str, Any],
    samples: Sequence[Sample] = (),
    backend: str | None = None,
) -> None:
    """Writes the card of a language model: an adapter or a whole model, with sample answers if there are any.

    Args:
        output_dir: The run's folder.
        run: The run's settings.
        results: Flat results; figures of cost are left out.
        samples: Prompts with the answers before and after training.
        backend: The name of the back end that trained the adapter; the one that the settings ask for if left out.
    """
    recipe, script, training, model = run.parts
    base, dataset = str(model.model_name_or_path), str(script.dataset_name)
    quoted = _quoted(base, model.model_revision)
    lora = None if recipe.method != "lora" else read_config(output_dir)
    settings: dict[str, Any] = {"method": recipe.method.replace("_", " ")}
    if lora is not None:
        trained = lora if recipe.adapter_name_or_path else build_lora_config(model, recipe)
        settings |= _adapter_settings(backend or recipe.lora_backend, recipe, lora, trained)
    settings |= {"base weights": _base_weights(model)} | _training_settings(training, results)
    settings |= {"longest row (tokens)": training.max_length, "packing": training.packing}
    load = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{HERE}")
model = AutoModelForCausalLM.from_pretrained("{HERE}")
```
"""
    if lora is not None:
        load = f"""With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{HERE}")
base = AutoModelForCausalLM.from_pretrained({quoted})
model = PeftModel.from_pretrained(base, "{HERE}")
```
{"" if find_unsupported(lora) else _loading_by_hand(quoted)}"""
    _write(
        output_dir,
        _metadata(
            "transformers" if lora is None else "peft",
            "text-generation",
            ("sft", "trl", "plainlora") if lora is None else ("lora", "sft", "trl", "plainlora"),
            base,
            dataset,
        ),
        f"{'This model is' if lora is None else 'A LoRA adapter for'} `{base}`, trained on `{dataset}` with PlainLoRA."
        f"{_parent_sentence(recipe.adapter_name_or_path)}\n"
        f"{_template_sentence(output_dir, recipe, training)}",
        results,
        settings,
        load,
        samples,
        "tuned" if lora is None else "adapter",
    )


def _head_sentence(head: str, in_base: bool) -> str:
    """A sentence about where the head comes from when the adapter is loaded."""
    if head == "trained whole":
        return "The trained head is saved with the adapter, and PEFT loads both:"
    where = "is the base's own" if in_base else "is saved with the adapter, because the base has none"
    if head == "LoRA":
        return (
            f"The head {where}, and carries LoRA too. Load it with PEFT as below, not with "
            "`AutoPeftModelForSequenceClassification`, which would train the head whole:"
        )
    return f"The head {where}, and PEFT loads it too:"


def write_classifier_card(
    output_dir: str | Path,
    run: ClassifySettings,
    config: PretrainedConfig,
    lora: LoraConfig | None,
    results: dict[str, Any],
    backend: str | None = None,
) -> None:
    """Writes the card of a classifier: an adapter with its head, or a whole model.

    Args:
        output_dir: The run's folder.
        run: The run's settings.
        config: The classifier's config, with its classes.
        lora: The adapter's config as it was trained; `None` for a whole model.
        results: Flat results; confusion matrices and figures of cost are left out.
        backend: See `write_sft_card`.
    """
    recipe, script, training, model = run.parts
    base, dataset = str(model.model_name_or_path), str(script.dataset_name)
    quoted = _quoted(base, model.model_revision)
    head = "trained whole" if recipe.train_head else "LoRA" if recipe.lora_head else "frozen as it started"
    settings: dict[str, Any] = {"method": recipe.method.replace("_", " ")}
    if lora is not None:
        settings |= _adapter_settings(backend or recipe.lora_backend, recipe, read_config(output_dir), lora)
        settings["head"] = head
    settings |= {"base weights": _base_weights(model)} | _training_settings(training, results)
    names = ", ".join(f"`{label}`" for label in class_names(config))
    if lora is not None:
        load = f"""{_head_sentence(head, is_classifier(config))}

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{HERE}")
base = AutoModelForSequenceClassification.from_pretrained(
    {quoted},
    id2label={config.id2label},
    pad_token_id={config.pad_token_id},
)
model = PeftModel.from_pretrained(base, "{HERE}")
```
"""
    else:
        load = _pipeline_loading("text-classification")
    _write(
        output_dir,
        _metadata(
            "peft" if lora else "transformers",
            "text-classification",
            ("lora", "plainlora") if lora else ("plainlora",),
            base,
            dataset,
        ),
        f"{'A LoRA adapter that makes' if lora else 'This model is'} `{base}`{'' if lora else ' made'} a "
        f"classifier of {names}, trained on `{dataset}` with PlainLoRA.",
        results,
        settings,
        load,
    )
