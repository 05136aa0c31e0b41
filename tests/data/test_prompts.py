"""Templates render to the letter what the models were trained on elsewhere."""

from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plainlora.data.encoding import Encoder, encode_rows
from plainlora.data.prompts import (
    adds_bos,
    assistant_message,
    install_template,
    render,
    render_prompt,
    user_message,
    without_bos,
)
from plainlora.errors import UserError
from tests.conftest import ROWS

# https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py, PROMPT_DICT
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# Its rows are written `<s>[INST] question [/INST] answer </s>`: https://huggingface.co/datasets/mlabonne/guanaco-llama2-1k
TURN = [user_message("Name a colour."), assistant_message("Red.")]


@pytest.fixture
def fresh(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, without a template, to be changed at will."""
    tokenizer.save_pretrained(tmp_path / "fresh")
    return AutoTokenizer.from_pretrained(tmp_path / "fresh")


@pytest.fixture
def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> before every text by itself, as Llama's does."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_alpaca_renders_both_prompts_of_stanford_alpaca(fresh: PreTrainedTokenizerFast) -> None:
    install_template(fresh, "alpaca")
    assert render_prompt("Do it.", fresh) == ALPACA_WITHOUT_INPUT.format(instruction="Do it.")
    assert render_prompt("Do it.", fresh, "With this.") == ALPACA_WITH_INPUT.format(
        instruction="Do it.", input="With this."
    )


def test_alpaca_ends_every_answer_with_eos(fresh: PreTrainedTokenizerFast) -> None:
    install_template(fresh, "alpaca")
    prompt = ALPACA_WITHOUT_INPUT.format(instruction="Name a colour.")
    assert render(TURN, fresh) == prompt + "Red.<|endoftext|>"
    assert render([*TURN, *TURN], fresh) == prompt + "Red.<|endoftext|>\n\n" + prompt + "Red.<|endoftext|>"


@pytest.mark.parametrize("context", ["", "  \n"])
def test_an_empty_input_is_no_input(fresh: PreTrainedTokenizerFast, context: str) -> None:
    install_template(fresh, "alpaca")
    assert "### Input:" not in render_prompt("Do it.", fresh, context)


@pytest.mark.parametrize("template", ["alpaca", "llama2"])
def test_an_unknown_role_is_refused(fresh: PreTrainedTokenizerFast, template: str) -> None:
    install_template(fresh, template)
    with pytest.raises(UserError, match="roles user and assistant, not system"):
        render([{"role": "system", "content": "Be kind."}, *TURN], fresh)


def test_llama2_renders_guanacos_format(with_bos: PreTrainedTokenizerFast) -> None:
    install_template(with_bos, "llama2")
    assert render(TURN, with_bos) == "<s>[INST] Name a colour. [/INST] Red. </s>"
    assert render([*TURN, *TURN], with_bos) == "<s>[INST] Name a colour. [/INST] Red. </s>" * 2
    assert render_prompt("Name a colour.", with_bos) == "<s>[INST] Name a colour. [/INST]"


def test_llama2_rendered_and_as_text_give_the_same_tokens_with_one_bos(with_bos: PreTrainedTokenizerFast) -> None:
    install_template(with_bos, "llama2")
    text = "<s>[INST] Name a colour. [/INST] Red. </s>"
    row = Encoder(with_bos, "text", "text", False)({"text": text})
    assert row["input_ids"] == ids(render(TURN, with_bos), with_bos)
    assert row["input_ids"].count(with_bos.bos_token_id) == 1
    assert row["input_ids"].count(with_bos.eos_token_id) == 1


def test_alpaca_spells_the_bos_only_where_the_tokenizer_adds_one(
    fresh: PreTrainedTokenizerFast, with_bos: PreTrainedTokenizerFast
) -> None:
    for tokenizer, start in ((fresh, "Below"), (with_bos, "<s>Below")):
        install_template(tokenizer, "alpaca")
        assert render(TURN, tokenizer).startswith(start)
        assert adds_bos(tokenizer) == (tokenizer is with_bos)


def test_a_bos_spelled_out_is_taken_off_only_where_one_is_added(
    fresh: PreTrainedTokenizerFast, with_bos: PreTrainedTokenizerFast
) -> None:
    assert without_bos("<s>text", with_bos) == "text"
    assert without_bos("<s>text", fresh) == "<s>text"


def test_a_file_is_a_template(fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\n")
    install_template(fresh, str(tmp_path / "own.jinja"))
    assert render(TURN, fresh) == "<user>Name a colour.<assistant>Red."


def test_none_keeps_the_tokenizers_own_template(fresh: PreTrainedTokenizerFast) -> None:
    fresh.chat_template = "own"
    install_template(fresh, None)
    assert fresh.chat_template == "own"


def test_an_unknown_template_lists_the_known_ones(fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("alpacca", "", str(tmp_path)):
        with pytest.raises(UserError, match=r"neither a built-in template \(alpaca, llama2\) nor a .jinja file"):
            install_template(fresh, name)


def test_a_damaged_template_file_is_one_line(fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.jinja cannot be read"):
        install_template(fresh, str(tmp_path / "binary.jinja"))
    (tmp_path / "syntax.jinja").write_text("{% for x in %}")
    with pytest.raises(UserError, match=r"syntax\.jinja is not a chat template: Expected an expression.* \(line 1\)"):
        install_template(fresh, str(tmp_path / "syntax.jinja"))


def test_a_tokenizers_damaged_template_is_no_rows_fault(fresh: PreTrainedTokenizerFast) -> None:
    fresh.chat_template = "{{ messages }"
    rows = Dataset.from_list([{"messages": TURN}])
    options = {"text_column": "text", "answers_only": True, "max_length": None, "on_overflow": "drop"}
    with pytest.raises(UserError, match=r"^the chat template of .*fresh is not valid: unexpected '}'"):
        encode_rows(rows, fresh, where="rows.jsonl", max_truncated=0.0, **options)


@pytest.mark.parametrize("template", ["alpaca", "llama2"])
def test_u06_a_saved_tokenizer_renders_as_training_did(
    with_bos: PreTrainedTokenizerFast, tmp_path: Path, template: str
) -> None:
    install_template(with_bos, template)
    with_bos.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == with_bos.chat_template
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert render([*TURN, *TURN], reloaded) == render([*TURN, *TURN], with_bos)
    assert render_prompt("a", reloaded, "b") == render_prompt("a", with_bos, "b")


@pytest.mark.parametrize("template", ["alpaca", "llama2"])
@pytest.mark.parametrize("which", ["fresh", "with_bos"])
def test_u06_the_inference_prompts_tokens_begin_the_training_row(
    request: pytest.FixtureRequest, template: str, which: str
) -> None:
    tokenizer = request.getfixturevalue(which)
    install_template(tokenizer, template)
    encode = Encoder(tokenizer, "instruction", "text", False)
    for row in ROWS:
        prompt = ids(render_prompt(row["instruction"], tokenizer, row["input"]), tokenizer)
        encoded = encode(row)
        assert encoded["input_ids"][: len(prompt)] == prompt
        assert encoded["prompt_is_prefix"]


def test_without_a_template_a_prompt_is_what_plain_text_training_saw(
    fresh: PreTrainedTokenizerFast, with_bos: PreTrainedTokenizerFast
) -> None:
    assert render_prompt("Once upon", fresh, " a time") == "Once upon a time"
    assert ids(render_prompt("Once upon", with_bos), with_bos) == with_bos("Once upon").input_ids
    with pytest.raises(UserError, match="no chat template: set prompt_template"):
        render(TURN, fresh)
