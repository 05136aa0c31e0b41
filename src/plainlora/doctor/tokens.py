"""Whether the tokenizer and its template will do in training what they will do when the adapter is used."""

import tempfile
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from plainlora.data.encoding import IGNORED
from plainlora.data.prompts import apply_template, assistant_message, render, user_message
from plainlora.doctor.finding import Examination
from plainlora.errors import UserError
from plainlora.tasks.rows import PreparedRows

ASKED = [user_message("Name a colour.", "It is warm."), assistant_message("Red.")]
TEXT = "Name a colour: red."
SHOWN = 24  # characters of what a template renders


def examine_saving(tokenizer: PreTrainedTokenizerBase, rendered: bool, examination: Examination) -> None:
    """Whether the tokenizer that is saved with the adapter renders and tokenises as the one that trains.

    A template that is lost on the way is what makes a model answer well here and badly on a server.

    Args:
        tokenizer: With the template installed.
        rendered: Whether the template makes the training texts.
        examination: Told what was found.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # None would ask on standard input
        except Exception as error:  # whatever a tokenizer's own code raises
            examination.add(
                "warning",
                "tokenizer",
                "saved",
                f"the saved tokenizer cannot be loaded again ({error}); serve the base's",
            )
            return
    differs = [
        what
        for what, left, right in (
            ("special tokens", tokenizer.special_tokens_map, again.special_tokens_map),
            ("tokens", tokenizer(TEXT).input_ids, again(TEXT).input_ids),
            *([("template", _rendered(tokenizer), _rendered(again))] if rendered else []),
        )
        if left != right
    ]
    if differs:
        said = (
            f"saved with the adapter and loaded again, it has another {' and other '.join(differs)}; mend the base's"
        )
        examination.add("error", "tokenizer", "saved", said)
    else:
        what = "renders and tokenises" if rendered else "tokenises"
        examination.add("ok", "tokenizer", "saved", f"saved and loaded again, it {what} the same")


def examine_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, own: str | dict[str, str] | None, examination: Examination
) -> None:
    """Whether the installed template renders what the base's own would, whose place it took.

    An instruct model answers in the format it was trained on; in another one it begins anew.

    Args:
        tokenizer: With the template installed.
        name: What was installed: `alpaca`, a file; `None` if nothing was.
        own: The chat template that the tokenizer came with, if any.
        examination: Told what was found.
    """
    if name is None or own is None:
        return
    if isinstance(own, dict):  # several, by what they are for
        own = own.get("default", "")
    rendered, replaced = (_attempt(tokenizer, chat_template=source) for source in (None, own))
    if rendered == replaced:
        said = f"prompt_template {name} renders as the chat template of {tokenizer.name_or_path} does"
        examination.add("ok", "tokenizer", "own template", said)
        return
    said = (
        f"prompt_template {name} ({rendered[:SHOWN]!r}...) replaces the chat template of {tokenizer.name_or_path} "
        f"({replaced[:SHOWN]!r}...); an instruct model knows its own alone; leave prompt_template out"
    )
    examination.add("warning", "tokenizer", "own template", said)


def _attempt(tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The conversation as a template renders it; nothing, if it knows no such conversation."""
    try:
        return str(apply_template(ASKED, tokenizer, **options))
    except UserError:
        return ""


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [render(ASKED, tokenizer), render(ASKED[:1], tokenizer, for_generation=True)]


def examine_padding(rows: PreparedRows, tokenizer: PreTrainedTokenizerBase, examination: Examination) -> None:
    """Whether padding as SFTTrainer does it leaves every label as it was, so that EOS is trained whatever the pad."""
    first = rows.train.select(range(min(100, len(rows.train))))
    examples: list[Any] = sorted(first, key=lambda row: len(row["input_ids"]))
    examples = [examples[0], examples[-1]]  # one is padded, unless all are of one length
    batch = DataCollatorForLanguageModeling(pad_token_id=int(tokenizer.pad_token_id or 0))(examples)
    kept = all(
        padded[: len(row["labels"])] == row["labels"] and set(padded[len(row["labels"]) :]) <= {IGNORED}
        for padded, row in zip(batch["labels"].tolist(), examples, strict=True)
    )
    pad, eos = f"{tokenizer.pad_token} ({tokenizer.pad_token_id})", f"{tokenizer.eos_token} ({tokenizer.eos_token_id})"
    if not kept:
        said = f"padding with {pad} changes the labels of a batch; set pad_token to another token than EOS {eos}"
        examination.add("error", "tokenizer", "pad", said)
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        said = f"EOS {eos} is also the pad token; labels come from lengths, so EOS is trained and padding is not"
        examination.add("note", "tokenizer", "pad", said)
    else:
        examination.add("ok", "tokenizer", "pad", f"EOS {eos} is trained, the pad token {pad} is not")


def examine_ids(largest: int, subject: str, config: PretrainedConfig | None, examination: Examination) -> None:
    """Whether the base has an embedding for every token.

    Args:
        largest: The largest token id in the rows.
        subject: Which rows.
        config: The base's; `None` if it could not be had.
        examination: Told what was found.
    """
    if config is None:
        return
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and largest >= size:
        said = f"token {largest} is none of the base's {size:,}; the tokenizer belongs to another base"
        examination.add("error", subject, "token ids", said, largest_id=largest, vocabulary=size)
    else:
        known = f"all below the base's {size:,}" if size is not None else "the base's config names no vocabulary"
        examination.add("ok", subject, "token ids", f"up to {largest:,}, {known}", largest_id=largest, vocabulary=size)
