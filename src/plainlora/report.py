"""What a run leaves for people: results, a picture, a model card, a summary."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import SchedulerType
from trl import ModelConfig, ScriptArguments, SFTConfig

from plainlora.arguments import RecipeArguments
from plainlora.data.datasets import hub_name, is_local
from plainlora.data.prompts import INPUT_MARK

SECRETS = ("hub_token", "push_to_hub_token")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


def write_json(path: str | Path, content: dict[str, Any], update: bool = False) -> None:
    """Writes sorted, indented JSON; with `update`, on top of what the file already holds."""
    path = Path(path)
    if update and path.is_file():
        content = json.loads(path.read_text(encoding="utf-8")) | content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def package_versions() -> dict[str, str]:
    """The versions a result was obtained with."""
    return {name: version(name) for name in PACKAGES}


def _without_secrets(command: Sequence[str]) -> list[str]:
    """The command without the values of secret flags, written `--flag value` or `--flag=value`."""
    kept: list[str] = []
    for word in command:
        flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
        follows = kept and kept[-1].removeprefix("--").replace("-", "_") in SECRETS
        kept.append("..." if follows else word.partition("=")[0] + "=..." if "=" in word and flag in SECRETS else word)
    return kept


def write_run(path: str | Path, arguments: Sequence[Any], quantization: dict[str, Any] | None) -> None:
    """`run.json`: the command, every resolved argument, versions, and how the base was stored.

    The base's quantisation is needed later, to merge into the very weights that the adapter was trained on. Tokens and
    keys are left out.
    """
    resolved: dict[str, Any] = {}
    for part in arguments:
        values = part.to_dict() if hasattr(part, "to_dict") else asdict(part) if is_dataclass(part) else {}  # type: ignore[arg-type]
        resolved |= {name: value for name, value in values.items() if name not in SECRETS}
    content = {
        "command": _without_secrets(sys.argv),
        "arguments": resolved,
        "quantization_config": quantization,
        "versions": package_versions(),
    }
    write_json(path, content)


def plot_loss(history: list[dict[str, Any]], base_loss: float | None, path: str | Path) -> None:
    """Training and test loss against optimizer steps; the base's test loss as a dotted line.

    Args:
        history: `trainer.state.log_history`.
        base_loss: Test loss of the base alone, in nats per token, if it was measured.
        path: The PNG to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")  # no pyplot: no window, whatever the machine has
    axes = figure.add_subplot()
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    test = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if train:
        axes.plot(*zip(*train, strict=True), color="#9aa5b1", linewidth=1.5, label="training rows")
    if test:
        axes.plot(*zip(*test, strict=True), color="#c2410c", marker="o", markersize=4, label="test rows")
    if base_loss is not None:
        axes.axhline(base_loss, color="#1f4e79", linestyle=":", label=f"test rows, base model ({base_loss:.2f})")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="LoRA fine-tuning")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _show(value: Any) -> str:
    if isinstance(value, bool):  # an int too, to Python
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: dict[str, Any]) -> str:
    body = "\n".join(f"| {name} | {_show(value)} |" for name, value in rows.items() if value is not None)
    return f"| | |\n|---|---|\n{body}"


def _base_weights(model: ModelConfig) -> str | None:
    """How the base was stored in training; a quantised base's `dtype` says nothing of that."""
    if model.load_in_4bit:
        return f"4-bit {model.bnb_4bit_quant_type}"
    return "8-bit" if model.load_in_8bit else model.dtype


def _template_sentence(output_dir: str | Path, recipe: RecipeArguments, training: SFTConfig) -> str:
    """What renders prompts. It speaks of conversations only: rows of plain text pass the template by."""
    if not (Path(output_dir) / "chat_template.jinja").is_file():
        return "Prompts are plain text: its tokenizer has no chat template."
    template = recipe.prompt_template or training.chat_template_path
    name = f"the template `{template}`" if template else "the base tokenizer's own template"
    return f"Conversations are rendered by {name} (`chat_template.jinja`)."


def write_model_card(
    output_dir: str | Path,
    recipe: RecipeArguments,
    script: ScriptArguments,
    training: SFTConfig,
    model: ModelConfig,
    results: dict[str, Any],
) -> None:
    """`README.md` in the Hub's format: metadata, data, settings, results, and how to load the adapter."""
    base, dataset = str(model.model_name_or_path), str(script.dataset_name)
    metadata = ["library_name: peft", "pipeline_tag: text-generation", "tags: [lora, sft, trl, plainlora]"]
    if not is_local(base):  # the Hub refuses a path here (transformers#33922)
        metadata.append(f"base_model: {base}")
    if hub_name(dataset):
        metadata.append(f"datasets: [{dataset}]")
    settings = {
        "LoRA back end": recipe.lora_backend,
        "r": model.lora_r,
        "alpha": model.lora_alpha,
        "dropout": model.lora_dropout,
        "target modules": model.lora_target_modules or "PEFT's default",
        "base weights": _base_weights(model),
        "learning rate": training.learning_rate,
        "schedule": SchedulerType(training.lr_scheduler_type).value,
        "epochs": training.num_train_epochs if training.max_steps <= 0 else None,
        "steps": training.max_steps if training.max_steps > 0 else None,  # it overrides the epochs
        "batch size": training.per_device_train_batch_size * training.world_size,
        "gradient accumulation": training.gradient_accumulation_steps,
        "longest row (tokens)": training.max_length,
        "packing": training.packing,
        "seed": training.seed,
    }
    text = f"""---
{chr(10).join(metadata)}
---

# {Path(output_dir).name}

A LoRA adapter for `{base}`, trained on `{dataset}` with PlainLoRA.
{_template_sentence(output_dir, recipe, training)}

## Results

{_table(results)}

## Training

{_table(settings)}

![loss](loss.png)

## Loading

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH OR HUB ID OF THIS ADAPTER")
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "PATH OR HUB ID OF THIS ADAPTER")
```

With PlainLoRA, from a local folder:

```python
from plainlora import load_adapter

model = load_adapter(base, "PATH OF THIS ADAPTER")
```
"""
    (Path(output_dir) / "README.md").write_text(text, encoding="utf-8")


def summary(results: dict[str, Any], output_dir: str, samples: Sequence[tuple[str, str, str]]) -> str:
    """The end of a run, for the terminal: the figures, some answers before and after, where things are, what next."""
    trainable, total = results["trainable_params"], results["total_params"]
    lines = ["", f"trainable parameters  {trainable:,} of {total:,} ({trainable / total:.2%})"]
    for title, key, form in (
        ("test loss", "eval_loss", "{:.3f}"),
        ("test perplexity", "eval_perplexity", "{:.1f}"),
        ("exact match", "exact_match", "{:.1%}"),
    ):
        if f"{key}_base" in results:
            before, after = (form.format(results[f"{key}_{arm}"]) for arm in ("base", "adapter"))
            lines.append(f"{title:<22}{before} -> {after}")
    if "merge_max_abs_diff" in results:
        lines.append(f"merged model          reloaded, logits differ by at most {results['merge_max_abs_diff']:.1e}")
    for prompt, before, after in samples:
        lines += [
            "",
            f"  {_one_line(prompt.replace(INPUT_MARK, ' '))}",
            f"    base   {_one_line(before)}",
            f"    tuned  {_one_line(after)}",
        ]
    lines += [
        "",
        f"adapter, model card, loss.png, all_results.json: {output_dir}",
    ]
    events = Path(output_dir) / "runs"  # where Trainer's TensorBoard callback writes
    if events.is_dir():
        lines.append(f"curves: tensorboard --logdir {events}")
    lines.append(f'next: plainlora generate --adapter {output_dir} --prompt "..."')
    if "merge_max_abs_diff" not in results:
        lines.append(f"      plainlora merge --adapter {output_dir} --output {output_dir}-merged")
    return "\n".join(lines)


def _one_line(text: str, width: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
