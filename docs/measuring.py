"""What the scripts that measure for the docs share. They are run as modules from a checkout's root."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent


def run(*command: str) -> str:
    """What a Python program prints.

    Raises:
        RuntimeError: It failed; the error has the end of its output.
    """
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def instruct_rows(source: str, tokenizer: str, longest: int, most: int | None = None) -> list[dict[str, Any]]:
    """Rows of Alpaca as prompts and completions, shuffled, without those of more than `longest` tokens."""
    chat = AutoTokenizer.from_pretrained(tokenizer)
    rows: list[dict[str, Any]] = []
    for row in load_dataset("json", data_files=source, split="train").shuffle(seed=0):
        asked = f"{row['instruction']}\n\n{row['input']}".strip()
        prompt = [{"role": "user", "content": asked}]
        completion = [{"role": "assistant", "content": row["output"]}]
        if len(chat.apply_chat_template(prompt + completion)["input_ids"]) <= longest and row["output"].strip():
            rows.append({"prompt": prompt, "completion": completion})
        if len(rows) == most:
            break
    return rows


def write_rows(folder: Path, **parts: list[dict[str, Any]]) -> None:
    """A file a part, one row a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
