"""Reads a GGUF file with llama.cpp alone, and writes what it makes of prompts.

It is run as a file, `python ask_llama_cpp.py QUESTIONS ANSWERS LOGITS`, in a process of its own: llama.cpp ends the
process where its build does not fit the processor, and nothing of this package is imported.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens at most
F32 = 0  # ggml's number for the type of the cached keys and values; the default, f16, would round once more


def chat(llama: Any, messages: list[dict[str, str]], new_tokens: int) -> dict[str, Any]:
    """The greedy answer of `create_chat_completion`, and the tokens of the prompt that it rendered for itself.

    It goes on past `max_tokens` while an answer ends in the middle of a character, which a model that answers in loose
    bytes does until its context is full; so this ends it.
    https://github.com/abetlen/llama-cpp-python/blob/v0.3.36/llama_cpp/llama.py (`multibyte_fix`)
    """
    complete, prompts = llama.create_completion, []

    def noted(*args: Any, **options: Any) -> Any:
        prompts.append(list(options["prompt"]))
        longest, given = len(prompts[0]) + new_tokens + LONGEST_CHARACTER, options["stopping_criteria"]

        def ends(tokens: Any, scores: Any) -> bool:
            return len(tokens) >= longest or (given is not None and given(tokens, scores))

        return complete(*args, **options | {"stopping_criteria": ends})

    llama.create_completion = noted
    try:
        llama.reset()
        answer = llama.create_chat_completion(messages, temperature=0.0, repeat_penalty=1.0, max_tokens=new_tokens)
    finally:
        del llama.create_completion
    return {"prompt": prompts[0], "answer": answer["choices"][0]["message"]["content"] or ""}


def ask(
    llama: Any, is_end: Callable[[int], bool], questions: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs a model on texts, chats and prompts with their answers.

    Args:
        llama: A `llama_cpp.Llama` that keeps all logits.
        is_end: Whether an answer ends at a token.
        questions: `texts`, to split into tokens; `chats`, lists of messages, and `new_tokens` of each answer;
            `prompts`, rows of `input_ids` with the `start` of the answer in them; `ends`, tokens.

    Returns:
        `texts`, `chats`, `eos` and whether answers end at each of `ends`; and `logits.N` of prompt N in fp32,
        `(1, tokens of the answer + 1, vocabulary)`.
    """
    found = {
        "texts": [llama.tokenize(text.encode(), add_bos=True, special=True) for text in questions["texts"]],
        "chats": [chat(llama, messages, questions["new_tokens"]) for messages in questions["chats"]],
        "eos": llama.token_eos(),
        "ends": [bool(is_end(token)) for token in questions["ends"]],
    }
    logits = {}
    for number, prompt in enumerate(questions["prompts"]):
        llama.reset()
        llama.eval(prompt["input_ids"])
        logits[f"logits.{number}"] = np.array(llama.scores[None, prompt["start"] - 1 : len(prompt["input_ids"])])
    return found, logits


def main(questions: str, answers: str, logits: str) -> None:
    """Reads the questions (JSON), writes the answers (JSON) and the logits (safetensors)."""
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    sys.path.append(asked["packages"])
    from llama_cpp import Llama, llama_token_is_eog  # noqa: PLC0415  # only where the line above points

    llama = Llama(
        model_path=asked["model"],
        lora_path=asked["lora"],
        n_ctx=asked["context"],
        n_batch=asked["context"],
        n_threads=os.cpu_count(),
        type_k=F32,
        type_v=F32,
        logits_all=True,
        verbose=False,
    )
    vocabulary = llama._model.vocab  # what has no public name
    found, values = ask(llama, partial(llama_token_is_eog, vocabulary), asked)
    found["version"] = importlib.metadata.version("llama-cpp-python")
    Path(answers).write_text(json.dumps(found), encoding="utf-8")
    save_file(values, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
