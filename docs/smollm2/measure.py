"""A real model trained by two recipes and by a plain TRL + PEFT script, for `results.json` and `results.md`.

    python -m docs.smollm2.measure --base PATH --alpaca FILE --guanaco FILE [--rounds 5]

The base is SmolLM2-135M-Instruct on this disk; the rows are Alpaca-GPT4 (instruction, input, output) and Guanaco
(text). Rows longer than 1,024 tokens are left out, and both sides train in bf16. The recipe trains once on all rows,
and its adapter is measured beside the base; time and memory come from short runs of both sides in alternation.
"""

import argparse
import json
import os
import platform
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from docs.measuring import run
from plainlora.report import package_versions

HERE = Path(__file__).parent
LONGEST, TEST_ROWS, ASKED, NEW_TOKENS, SHOWN = 1024, 100, 40, 256, 5
# The recipe, and what both sides are told: rows a step, and steps of a short run.
RECIPES: dict[str, tuple[str, dict[str, int]]] = {
    "instruct": ("recipes/instruct/lora.yaml", {"batch": 2, "short": 8}),
    "guanaco": ("recipes/llama2-7b-guanaco/qlora.yaml", {"batch": 4, "short": 6}),
}


def write_rows(name: str, source: str, tokenizer: Any, folder: Path) -> None:
    """The same rows for both sides, in `train/train.jsonl`; those to test on, in `test.jsonl`, neither side sees."""
    import datasets  # noqa: PLC0415

    rows: list[dict[str, Any]] = []
    for row in datasets.load_dataset("json", data_files=source, split="train"):
        if name == "guanaco":
            rows.append({"text": row["text"]})
            ids = tokenizer(row["text"]).input_ids
        else:
            asked = f"{row['instruction']}\n\n{row['input']}".strip()
            prompt, completion = (
                [{"role": "user", "content": asked}],
                [{"role": "assistant", "content": row["output"]}],
            )
            rows.append({"prompt": prompt, "completion": completion})
            ids = tokenizer(tokenizer.apply_chat_template(prompt + completion, tokenize=False)).input_ids
        if len(ids) >= LONGEST:
            rows.pop()
    random.Random(0).shuffle(rows)
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for file, part in (("test.jsonl", rows[:TEST_ROWS]), ("train/train.jsonl", rows[TEST_ROWS:])):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in part))


def train(side: str, name: str, base: str, rows: Path, output: Path, max_steps: int = -1) -> dict[str, Any]:
    """One run of the recipe, or of the script: steps, seconds of training, peak memory of the process."""
    recipe, told = RECIPES[name]
    if side == "TRL + PEFT":
        flags = ["--base", base, "--rows", str(rows), "--output_dir", str(output), "--batch", str(told["batch"])]
        out = run("docs/smollm2/trl_peft.py", name, *flags, "--max_steps", str(max_steps))
        return dict(json.loads(out.strip().splitlines()[-1]))
    run(
        *("recipes/sft.py", "--config", recipe, "--model_name_or_path", base, "--dataset_name", str(rows)),
        *("--output_dir", str(output), "--overwrite", "--max_steps", str(max_steps), "--report_to", "none"),
        *("--num_train_epochs", "1", "--gradient_checkpointing", "false", "--save_strategy", "no"),
        *("--eval_strategy", "no", "--max_new_tokens", "1", "--per_device_train_batch_size", str(told["batch"])),
        *("--dtype", "bfloat16", "--bf16", "true", *(("--fp16", "false") if name == "guanaco" else ())),
    )
    results = json.loads((output / "all_results.json").read_text())
    steps = json.loads((output / "trainer_state.json").read_text())["global_step"]
    return {"steps": steps, "seconds": results["train_runtime"], "peak_memory_bytes": results["peak_memory_bytes"]}


def load(name: str, base: str) -> Any:
    """The base as both sides train it."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    quantization = {"quantization_config": nf4} if name == "guanaco" else {}
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **quantization).eval()


def questions(name: str, rows: list[dict[str, Any]], tokenizer: Any) -> Iterator[tuple[str, str]]:
    """What each test row asks, as text and as the model is asked in training."""
    for row in rows:
        if name == "guanaco":
            asked, end, _ = row["text"].partition("[/INST]")
            yield asked.removeprefix("<s>[INST]").strip(), asked + end
        else:
            rendered = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            yield row["prompt"][0]["content"], rendered


def labelled(name: str, row: dict[str, Any], tokenizer: Any) -> tuple[list[int], int]:
    """A row's tokens, and how many of the first are not trained."""
    if name == "guanaco":
        return [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id], 0
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    return tokenizer(whole).input_ids, len(tokenizer(prompt).input_ids)


@torch.no_grad()
def measure(name: str, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Test loss in nats a trained token, the share of greedy answers that end by themselves, and the answers."""
    nats = tokens = ended = 0.0
    answers = []
    for row in tqdm(rows, desc="test loss", leave=False):
        ids, prompt = labelled(name, row, tokenizer)
        labels = [-100] * prompt + ids[prompt:]
        count = len(ids) - max(prompt, 1)
        nats += float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss) * count
        tokens += count
    tokenizer.padding_side = "left"
    prompts = [prompt for _, prompt in questions(name, rows[:ASKED], tokenizer)]
    for start in tqdm(range(0, len(prompts), 20), desc="answers", leave=False):
        batch = tokenizer(prompts[start : start + 20], padding=True, return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[:, batch["input_ids"].shape[1] :]
        ended += sum(tokenizer.eos_token_id in row for row in output.tolist())
        answers += [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    return {"test_loss": nats / tokens, "ended": ended / len(prompts), "answers": answers[:SHOWN]}


def main() -> None:
    """Runs what has not been run, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "alpaca", "guanaco"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--work", default="outputs/smollm2", help="where the runs lie")
    parser.add_argument("--rounds", type=int, default=5, help="short runs of each side, in alternation; 0 for none")
    parser.add_argument("--only", choices=sorted(RECIPES))
    args = parser.parse_args()
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    results_file = HERE / "results.json"
    results: dict[str, Any] = json.loads(results_file.read_text()) if results_file.exists() else {}
    for name in [args.only] if args.only else RECIPES:
        work = Path(args.work) / name
        write_rows(name, args.alpaca if name == "instruct" else args.guanaco, tokenizer, work / "rows")
        test = [json.loads(line) for line in (work / "rows" / "test.jsonl").read_text().splitlines()]
        found = results.setdefault(name, {"config": RECIPES[name][0], "test_rows": len(test)})
        found["train_rows"] = len((work / "rows" / "train" / "train.jsonl").read_text().splitlines())
        found["asked"] = [text for text, _ in questions(name, test[:SHOWN], tokenizer)]
        turns = found.setdefault("turns", {"recipe": [], "TRL + PEFT": []})
        for _ in range(args.rounds):
            for side in turns:
                short = (work / "short").resolve()
                turns[side].append(
                    train(side, name, args.base, (work / "rows" / "train").resolve(), short, RECIPES[name][1]["short"])
                )
                results_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        if "base" not in found:
            found["base"] = measure(name, load(name, args.base), tokenizer, test)
        if "recipe" not in found:
            output = (work / "recipe").resolve()
            found["recipe"] = train("recipe", name, args.base, (work / "rows" / "train").resolve(), output)
            model = PeftModel.from_pretrained(load(name, args.base), output)
            found["recipe"] |= measure(name, model, tokenizer, test)
            results_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    results["machine"] = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    results["versions"] = package_versions()
    results_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    (HERE / "results.md").write_text("# Answers of a real model\n\n" + table(results))


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: losses and answers that end, then time and memory, then the answers."""
    lines = ["| recipe | rows | side | test loss | answers that end | s / step | / TRL + PEFT | peak memory |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|---:|")
    for name in RECIPES:
        found = results.get(name)
        if found is None:
            continue
        for side in ("base", "recipe", "TRL + PEFT"):
            what = found.get(side)
            row = [f"`{found['config']}`", f"{found['train_rows']}", side]
            row += [f"{what['test_loss']:.4f}", f"{what['ended']:.0%}"] if what else ["", ""]
            turns = found["turns"].get(side)
            if turns:
                seconds = [turn["seconds"] / turn["steps"] for turn in turns]
                theirs = [turn["seconds"] / turn["steps"] for turn in found["turns"]["TRL + PEFT"]]
                ratios = [a / b for a, b in zip(seconds, theirs, strict=True)]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                peak = max(turn["peak_memory_bytes"] for turn in turns)
                row += [f"{statistics.median(seconds):.2f}", "1" if side == "TRL + PEFT" else spread]
                row.append(f"{peak / 1e9:.2f} GB")
            else:
                row += ["", "", ""]
            lines.append("| " + " | ".join(row) + " |")
    for name in RECIPES:
        found = results.get(name, {})
        for number, asked in enumerate(found["asked"] if "recipe" in found else ()):
            lines += ["", f"**{name} {number + 1}**: {_flat(asked)}", ""]
            lines += [f"- {side}: {_flat(found[side]['answers'][number])}" for side in ("base", "recipe")]
    return "\n".join(lines) + "\n"


def _flat(text: str) -> str:
    """In one line, as code: an answer may hold what Markdown would take for its own."""
    line = " ".join(text.split()).replace("`", "'")
    return f"`{line}`" if line else "(empty)"


if __name__ == "__main__":
    main()
