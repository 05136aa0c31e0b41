"""Whether llama.cpp makes of a GGUF file what Transformers makes of the adapter: tokens, chat, answers, logits."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from plainlora.data.prompts import render_prompt
from plainlora.errors import UserError
from plainlora.export.gguf_file import Quantization
from plainlora.export.prompts import QUESTIONS, TEXTS
from plainlora.export.vocabulary import Vocabulary
from plainlora.generation import generate
from plainlora.merging.eval_prompts import answered
from plainlora.merging.reload import ask

NEW_TOKENS = 16  # at most, of every answer
SPARE_CONTEXT = 8  # tokens
HOW_TO_PROVE = "make llama-cpp, in a checkout, builds it; then export again"
ILLEGAL_INSTRUCTION = -4  # what a process returns that SIGILL ended

# Largest |difference| of a logit divided by the largest |logit|, in f16. llama.cpp also rounds the input of every
# product to f16, so that each of some hundred products adds about 2^-11.
BOUND = 1e-2


def find_llama_cpp() -> str | None:
    """The folder that `llama_cpp` is imported from: the environment's, or the one that `make llama-cpp` makes."""
    found = importlib.util.find_spec("llama_cpp")
    if found is not None and found.origin is not None:
        return str(Path(found.origin).parents[1])
    beside = Path(sys.prefix) / "llama_cpp"
    return str(beside) if (beside / "llama_cpp" / "__init__.py").is_file() else None


@dataclass(frozen=True)
class Reference:
    """What Transformers makes of the adapter on its base, in fp32.

    Attributes:
        texts: The token ids of each of `TEXTS`.
        rendered: The token ids of each chat's prompt.
        answers: Its greedy answer.
        prompts: Each prompt with its answer: `input_ids` and the `start` of the answer.
        logits: `logits.N`, `(1, tokens of the answer + 1, vocabulary)`.
    """

    texts: list[list[int]]
    rendered: list[list[int]]
    answers: list[str]
    prompts: list[dict[str, Any]]
    logits: dict[str, torch.Tensor]


def chats() -> list[list[dict[str, str]]]:
    """The chats as messages."""
    return [[{"role": "user", "content": text}] for text in QUESTIONS]


def ask_transformers(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Reference:
    """Runs a model with its adapter, or merged, on all questions."""
    rendered = [render_prompt(text, tokenizer) for text in QUESTIONS]
    answers = generate(model, tokenizer, rendered, NEW_TOKENS)
    prompts, logits = answered(tokenizer, rendered, answers)["prompts"], {}
    for number, prompt in enumerate(prompts):
        of_all = ask(model, {"prompts": [{"input_ids": prompt["input_ids"]}], "texts": []})["logits.0"]
        logits[f"logits.{number}"] = of_all[:, prompt["start"] - 1 :].clone()
    texts = [list(tokenizer(text, verbose=False).input_ids) for text in TEXTS]
    ids = [list(tokenizer(text, add_special_tokens=False).input_ids) for text in rendered]
    return Reference(texts, ids, answers, prompts, logits)


def ask_llama_cpp(
    model: Path, lora: Path | None, reference: Reference, context: int, ends: list[int], whole: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What llama.cpp makes of a file; see `plainlora.export.ask_llama_cpp.ask`.

    Args:
        model: The file of a whole model.
        lora: The file of an adapter on it.
        reference: Whose prompts to ask.
        context: The model's context length, in tokens.
        ends: Tokens at which answers end.
        whole: Whether texts and chats are asked too, or only logits.

    Raises:
        UserError: llama.cpp cannot read the file, or ended.
    """
    longest = max(len(prompt["input_ids"]) for prompt in reference.prompts) + NEW_TOKENS + SPARE_CONTEXT
    questions = {
        "packages": find_llama_cpp(),
        "model": str(model),
        "lora": None if lora is None else str(lora),
        "context": min(longest, context),
        "texts": TEXTS if whole else (),
        "chats": chats() if whole else (),
        "new_tokens": NEW_TOKENS,
        "prompts": reference.prompts,
        "ends": ends,
    }
    with tempfile.TemporaryDirectory() as scratch:
        asked, answers, logits = (Path(scratch) / name for name in ("questions", "answers", "logits"))
        asked.write_text(json.dumps(questions), encoding="utf-8")
        program = Path(__file__).with_name("ask_llama_cpp.py")
        command = [sys.executable, str(program), str(asked), str(answers), str(logits)]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if run.returncode == ILLEGAL_INSTRUCTION:
            raise UserError(
                f"this build of llama.cpp does not fit this processor (illegal instruction); {HOW_TO_PROVE}"
            )
        if run.returncode != 0:
            raise UserError(f"llama.cpp cannot read {model.name}; nothing was written: {run.stderr.strip()[-400:]}")
        return json.loads(answers.read_text(encoding="utf-8")), load_file(logits)


def compare_logits(reference: Reference, found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far a model's logits are from Transformers', along Transformers' answers.

    Returns:
        `max_abs_diff` of a logit; `relative_diff`, the same divided by the largest; `mean_kl`, of Transformers' next
        token from the file's, in nats; `positions`, `equal_positions`: whether the likeliest token is the same;
        `answers`, `equal_answers`: whether it is so at every position, which makes a greedy answer the same;
        `widest_miss`, the largest difference between Transformers' logits of its likeliest token and of the file's.
    """
    difference = scale = miss = kl = 0.0
    positions = same = whole = 0
    for name, expected in reference.logits.items():
        theirs, mine = expected[0].double(), found[name][0].double()  # (tokens, vocabulary)
        difference = max(difference, float((theirs - mine).abs().max()))
        scale = max(scale, float(theirs.abs().max()))
        kl += float(
            nn.functional.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)
        )
        chosen = mine.argmax(-1, keepdim=True)
        equal = (theirs.argmax(-1, keepdim=True) == chosen).squeeze(-1)
        miss = max(miss, float((theirs.amax(-1) - theirs.gather(-1, chosen).squeeze(-1)).max()))
        positions, same, whole = positions + len(equal), same + int(equal.sum()), whole + int(equal.all())
    return {
        "max_abs_diff": difference,
        "relative_diff": difference / scale,
        "mean_kl": kl / positions,
        "positions": positions,
        "equal_positions": same,
        "answers": len(reference.logits),
        "equal_answers": whole,
        "widest_miss": miss,
    }


def prove(
    files: dict[Quantization, Path],
    lora: Path | None,
    reference: Reference,
    context: int,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Holds the f16 file to Transformers, and measures what the others cost.

    Args:
        files: Whole models by their types, f16 among them.
        lora: The adapter on them; `None` if they are merged.
        reference: What Transformers makes of it.
        context: The model's context length, in tokens.
        vocabulary: The tokenizer as it stands in the files.

    Raises:
        UserError: llama.cpp reads something else in the file.
    """
    ends = sorted({vocabulary.ids[role] for role in ("eos", "eot", "eom") if role in vocabulary.ids})
    found, logits = ask_llama_cpp(files["f16"], lora, reference, context, ends, whole=True)
    split = [mine == theirs for mine, theirs in zip(found["texts"], reference.texts, strict=True)]
    known = [not any(word in text for word in vocabulary.misread) for text in TEXTS]
    for text, equal, checked in zip(TEXTS, split, known, strict=True):
        if vocabulary.same_on_plain_text and checked and not equal:
            raise UserError(f"llama.cpp splits {text!r:.60} into other tokens than Transformers; nothing was written")
    prompts = [chat["prompt"] == theirs for chat, theirs in zip(found["chats"], reference.rendered, strict=True)]
    if not all(prompts):
        raise UserError(
            f"the chat call of llama-cpp-python gives the model another prompt than Transformers for "
            f"{QUESTIONS[prompts.index(False)]!r:.60}; nothing was written"
        )
    eos = vocabulary.ids["eos"]
    if found["eos"] != eos:
        raise UserError(f"llama.cpp reads the EOS {found['eos']} from the file, and the tokenizer's is {eos}")
    if not all(found["ends"]):
        token = vocabulary.tokens[ends[found["ends"].index(False)]]
        raise UserError(
            f"llama.cpp does not end an answer at {token!r:.40}, and Transformers does; nothing was written"
        )
    costs = {"f16": compare_logits(reference, logits)}
    if not costs["f16"]["relative_diff"] <= BOUND:
        raise UserError(
            f"llama.cpp's logits differ from Transformers' by {costs['f16']['relative_diff']:.1e} of the largest, "
            f"more than the {BOUND:.0e} allowed in f16; nothing was written"
        )
    answers = [
        chat["answer"].strip() == theirs for chat, theirs in zip(found["chats"], reference.answers, strict=True)
    ]
    for kind, path in files.items():
        if kind != "f16":
            costs[kind] = compare_logits(reference, ask_llama_cpp(path, lora, reference, context, [], whole=False)[1])
    return {
        "llama_cpp_python": found["version"],
        "texts": len(split),
        "equal_texts": sum(split),
        "chats": len(prompts),
        "equal_chat_prompts": sum(prompts),
        "equal_chat_answers_in_f16": sum(answers),
        "new_tokens": NEW_TOKENS,
        "bound": BOUND,
        "costs": costs,
    }
