"""Every chat template and every layout of a row gives the tokens and labels that SFTTrainer makes of it."""

import copy
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import trl.chat_template_utils
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from plainlora.data.coverage import Coverage
from plainlora.data.encoding import IGNORED, Encoder
from plainlora.data.layouts import find_schema, is_rendered, split_row, template_options
from plainlora.data.prompts import TEMPLATES
from plainlora.errors import UserError
from tests.conftest import make_model

# https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/tokenizer_config.json
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def calling(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": arguments}}


CITY = {"city": "Ghent", "days": 2}
SYSTEM = said("system", "Answer in French.")
USER, AGAIN = said("user", "Name a colour."), said("user", "Another?")
RED, BLUE = said("assistant", "rouge"), said("assistant", "bleu")
ASKED = said("user", "What is the weather in Ghent?")
RAIN = said("tool", '{"sky": "rain"}', name="weather", tool_call_id="call00001")
RAINS = said("assistant", "It rains.")
CALL = [ASKED, said("assistant", "", tool_calls=[calling(CITY)]), RAIN, RAINS]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Which."}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The sky.", "parameters": PARAMETERS}}]

LAYOUTS: dict[str, dict[str, Any]] = {
    "text": {"text": "Plain words."},
    "text that ends in EOS": {"text": "Plain words.<|endoftext|>"},
    "two texts": {"prompt": "A colour: ", "completion": "rouge"},
    "two texts that merge": {"prompt": "It i", "completion": "s here."},
    "prompt and completion": {"prompt": [USER], "completion": [RED]},
    "prompt with a system message": {"prompt": [SYSTEM, USER], "completion": [RED]},
    "prompt of several turns": {"prompt": [USER, RED, AGAIN], "completion": [BLUE]},
    "completion of several messages": {"prompt": [USER], "completion": [RED, AGAIN, BLUE]},
    "completion with a tool call": {"prompt": CALL[:1], "completion": CALL[1:], "tools": TOOLS},
    "prompt with kwargs": {"prompt": [USER], "completion": [RED], "chat_template_kwargs": {"enable_thinking": False}},
    "messages": {"messages": [USER, RED]},
    "with a system message": {"messages": [SYSTEM, USER, RED]},
    "several turns": {"messages": [SYSTEM, USER, RED, AGAIN, BLUE]},
    "unicode": {"messages": [said("user", "Où ?\n\n 🦙"), said("assistant", "à Gand — 你好 ")]},
    "ends with the user": {"messages": [USER, RED, AGAIN]},
    "begins with the assistant": {"messages": [RED, AGAIN, BLUE]},
    "no assistant": {"messages": [USER]},
    "roles of others": {"messages": [said("developer", "Be brief."), USER, RED]},
    "tools": {"messages": [USER, RED], "tools": TOOLS},
    "tools as JSON": {"messages": CALL, "tools": '[{"type": "function", "function": {"name": "weather"}}]'},
    "no tools": {"messages": [USER, RED], "tools": []},
    "tool call": {"messages": CALL, "tools": TOOLS},
    "tool call without content": {
        "messages": [ASKED, said("assistant", None, tool_calls=[calling(CITY)]), RAIN, RAINS]
    },
    "tool call that ends the row": {"messages": CALL[:2], "tools": TOOLS},
    "tool call with arguments as JSON": {
        "messages": [ASKED, {"role": "assistant", "tool_calls": [calling('{"city": "Ghent"}')]}, RAIN, RAINS]
    },
    "tool call with content": {
        "messages": [
            ASKED, said("assistant", "I look.", tool_calls=[calling(CITY), calling({"city": None})]), RAIN, RAINS,
        ]
    },
    "reasoning": {"messages": [USER, said("assistant", "rouge", reasoning_content="It is warm.")]},
    "reasoning in the content": {"messages": [USER, said("assistant", "<think>\nIt is warm.\n</think>\n\nrouge")]},
    "reasoning of several turns": {
        "messages": [
            USER, said("assistant", "rouge", thinking="Warm."), AGAIN, said("assistant", "bleu", thinking="Cold."),
        ]
    },
    "content in parts": {
        "messages": [
            said("user", [{"type": "text", "text": "Name a colour."}]),
            said("assistant", [{"type": "text", "text": "rouge"}]),
        ]
    },
    "ShareGPT": {"conversations": [{"from": "user", "value": "Name it."}, {"from": "assistant", "value": "rouge"}]},
    "ShareGPT's roles": {"conversations": [{"from": "human", "value": "Name it."}, {"from": "gpt", "value": "rouge"}]},
    "kwargs": {"messages": [USER, RED], "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}},
    "kwargs that nothing reads": {"messages": [USER, RED], "chat_template_kwargs": {"nothing": 1}},
    "an own template": {
        "messages": [USER, RED], "chat_template_kwargs": {"chat_template": "{{ messages[0].content }}"}
    },
}  # fmt: skip
MODES: dict[str, dict[str, bool]] = {
    "all": {"completion_only_loss": False},
    "completion": {"completion_only_loss": True},
    "assistant": {"completion_only_loss": True, "assistant_only_loss": True},
}
MARKED_CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
MARKED = "{% generation %}x{% endgeneration %}"  # whatever the template under test makes of the trainer's own row


def templates() -> dict[str, str]:
    """Every chat template in TRL's package, the built-in ones, and SmolLM2's."""
    package = Path(trl.chat_template_utils.__file__).parent / "chat_templates"
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(package.glob("*.jinja"))}
    own = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(TEMPLATES.glob("*.jinja"))}
    return found | own | {"smollm2": SMOLLM2}


@pytest.fixture(scope="module")
def own(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer to change, with every token that a template may name."""
    copied = copy.deepcopy(tokenizer)
    copied.add_special_tokens({"bos_token": "<s>", "unk_token": "<unk>"})
    return copied


def modes_of(row: dict[str, Any]) -> list[str]:
    """What can be asked of a row: a text is trained whole, texts have no roles, messages no prompt of their own."""
    if "prompt" not in row:
        return ["all"] if "text" in row else ["all", "assistant"]
    return ["all", "completion"] if isinstance(row["prompt"], str) else list(MODES)


def make_trainer(own: PreTrainedTokenizerFast, folder: Path, row: dict[str, Any], **settings: bool) -> SFTTrainer:
    args = SFTConfig(
        output_dir=str(folder), max_length=None, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    return SFTTrainer(make_model("llama"), args, train_dataset=rows_of(row), processing_class=own)


def rows_of(row: dict[str, Any]) -> Dataset:
    """One row, as it is written."""
    return Dataset.from_list([row], on_mixed_types="use_json")


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    """Rows as they are written; as a stream, of which `datasets` takes no fingerprint and keeps no cache."""
    return IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows)))


Encoded = list[tuple[list[int], list[int]]]


def by_trl(trainer: SFTTrainer | ValueError, rows: list[dict[str, Any]], own: PreTrainedTokenizerFast) -> Encoded:
    """What SFTTrainer's own preparation makes of the rows; raises what it raises."""
    if isinstance(trainer, ValueError):
        raise trainer
    prepared = trainer._prepare_dataset(stream(rows), own, trainer.args, False, None, "train")
    return [(list(row["input_ids"]), list(row["labels"])) for row in prepared]


def by_encoder(rows: Dataset, own: PreTrainedTokenizerFast, mode: str) -> tuple[list[int], list[int]] | None:
    """What this project makes of a row; `None` if it refuses."""
    settings = MODES[mode]
    try:
        schema = find_schema(rows, "text", "rows")
        # On rows of messages completion_only_loss alone has a meaning that TRL does not know; see the last test.
        answers_only = settings["completion_only_loss"] and schema == "prompt"
        encode = Encoder(own, schema, "text", answers_only, settings.get("assistant_only_loss", False))
        found = encode(rows[0])
        if is_rendered(rows[0], schema):  # nor does what looks for losses fail on any
            assert Coverage(own)([*chain(*split_row(rows[0], schema))], template_options(rows[0])) is not None
    except UserError:
        return None
    return list(found["input_ids"]), list(found["labels"])


def test_every_template_and_layout_gives_trls_tokens_and_labels_or_is_refused_by_both(
    own: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own.chat_template = SMOLLM2
    whole = {"prompt": [USER], "completion": [RED]}
    trainers: dict[str, Any] = {
        mode: make_trainer(own, tmp_path, whole, **MODES[mode]) for mode in ("all", "completion")
    }
    read = {layout: rows_of(row) for layout, row in LAYOUTS.items()}
    counts, wrong = Counter[tuple[str, str]](), list[str]()
    for name, template in templates().items():
        own.chat_template = template
        try:
            row = {"messages": [USER, RED], "chat_template_kwargs": {"chat_template": MARKED}}
            trainers["assistant"] = make_trainer(own, tmp_path, row, **MODES["assistant"])
        except ValueError as error:  # TRL has no training template for it
            trainers["assistant"] = error
        for mode in MODES:
            groups: dict[tuple[str, ...], list[tuple[str, tuple[list[int], list[int]]]]] = {}
            for layout, row in LAYOUTS.items():
                if mode not in modes_of(row):
                    continue
                mine = by_encoder(read[layout], own, mode)
                if mine is not None:  # together with the rows of the same columns
                    groups.setdefault((*row, str(type(next(iter(row.values()))))), []).append((layout, mine))
                    continue
                try:
                    by_trl(trainers[mode], [row], own)
                    wrong.append(f"{name}, {layout}, {mode}: refused, but not by TRL")
                except Exception:  # whatever a template or TRL raises
                    counts[mode, "refused"] += 1
            for group in groups.values():
                if isinstance(trainers[mode], ValueError):  # the tokens of the assistant are derived; see test_spans
                    counts[mode, "not in TRL"] += len(group)
                    continue
                theirs = by_trl(trainers[mode], [LAYOUTS[layout] for layout, _ in group], own)
                for (layout, mine), expected in zip(group, theirs, strict=True):
                    counts[mode, "equal"] += mine == expected
                    if mine != expected:
                        wrong.append(f"{name}, {layout}, {mode}: other tokens or labels than TRL's")
    print(f"{len(templates())} templates, {len(LAYOUTS)} layouts: {dict(counts)}")
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"
    asked = len(templates()) * sum(len(modes_of(row)) for row in LAYOUTS.values())
    assert counts.total() == asked
    assert counts == {
        **{("all", "equal"): 2356, ("all", "refused"): 269},
        **{("completion", "equal"): 569, ("completion", "refused"): 31},
        **{("assistant", "equal"): 1636, ("assistant", "refused"): 484, ("assistant", "not in TRL"): 205},
    }


def test_completion_only_loss_is_honoured_where_trl_passes_over_it(
    own: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The only differences: on rows of one column TRL trains everything, without a word."""
    own.chat_template = MARKED_CHAT
    text, chat = LAYOUTS["text"], LAYOUTS["messages"]
    for row in (text, chat):
        ((ids, labels),) = by_trl(make_trainer(own, tmp_path, row, completion_only_loss=True), [row], own)
        assert labels == ids
    found = Encoder(own, "messages", "text", answers_only=True)(chat)
    assert found["input_ids"] == ids
    assert own.decode([label for label in found["labels"] if label != IGNORED]) == "rouge<|endoftext|>"
    with pytest.raises(UserError, match="completion_only_loss needs rows that tell the answer from the prompt"):
        Encoder(own, "text", "text", answers_only=True)


@pytest.mark.parametrize("layout", ["text", "two texts"])
def test_assistant_only_loss_needs_messages_as_in_trl(
    own: PreTrainedTokenizerFast, tmp_path: Path, layout: str
) -> None:
    own.chat_template = MARKED_CHAT
    with pytest.raises(ValueError, match="dataset is not conversational"):
        make_trainer(own, tmp_path, LAYOUTS[layout], assistant_only_loss=True)
    rows = rows_of(LAYOUTS[layout])
    with pytest.raises(UserError, match="assistant_only_loss needs"):
        Encoder(own, find_schema(rows, "text", "rows"), "text", False, assistant_only=True)(rows[0])
