"""A tokenizer is written as llama.cpp reads it, found by what it does; what it would split otherwise is refused."""

import copy
import json
from collections.abc import Callable

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from plainlora.errors import UserError
from plainlora.export.vocabulary import read_vocabulary
from tests.conftest import ROWS, VOCABULARY

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


SPLITTINGS: dict[str, tuple[pre_tokenizers.PreTokenizer, bool]] = {  # of published tokenizers
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        False,
    ),
    "qwen2": (split(rf"{CONTRACTIONS}|\p{{N}}|{REST}"), False),
    "llama-bpe": (split(rf"{CONTRACTIONS}|\p{{N}}{{1,3}}|{REST}"), True),
    "dbrx": (split(rf"{CONTRACTIONS}|\p{{N}}{{1,3}}|{REST}"), False),
}


def splitting_by(
    tokenizer: PreTrainedTokenizerBase, splitting: pre_tokenizers.PreTokenizer, ignore_merges: bool
) -> PreTrainedTokenizerFast:
    """The same vocabulary, with text split otherwise."""
    changed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    changed.pre_tokenizer = splitting
    content = json.loads(changed.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


def sentencepiece(prefix: str = "every") -> PreTrainedTokenizerFast:
    """Llama 2's kind: spaces as U+2581, merges over whole texts, a token for each byte, a BOS before every text."""
    escaped = normalizers.Replace(" ", "▁")
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escaped])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator((word for row in ROWS for word in row["output"].split()), trainer)
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in learned["vocab"] if token not in tokens]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "every":
        backend.normalizer = trained.normalizer
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.mark.parametrize("name", SPLITTINGS)
def test_the_pre_tokenizer_is_found_by_what_it_does(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = read_vocabulary(splitting_by(tokenizer, *SPLITTINGS[name]), VOCABULARY)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", name)
    assert vocabulary.merges


def changed_normalizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def striped(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return tokenizer


def without_eos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda each: splitting_by(each, pre_tokenizers.Whitespace(), False), "splits text by Whitespace"),
        (lambda each: splitting_by(each, pre_tokenizers.ByteLevel(add_prefix_space=True), False), "by ByteLevel"),
        (lambda each: splitting_by(each, pre_tokenizers.ByteLevel(add_prefix_space=False), True), "by ByteLevel"),
        (changed_normalizer, "normalizer Lowercase"),
        (striped, "'<mask>' has lstrip"),
        (without_eos, "has no EOS token, and llama.cpp would take another one"),
    ],
)
def test_what_llama_cpp_would_split_or_end_otherwise_is_refused(
    change: Callable[[PreTrainedTokenizerFast], PreTrainedTokenizerFast], says: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=says):
        read_vocabulary(change(copy.deepcopy(tokenizer)), VOCABULARY)


def test_rows_without_a_token_special_tokens_and_roles_are_written(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = read_vocabulary(tokenizer, VOCABULARY + 2)
    assert vocabulary.tokens[0] == "<|endoftext|>"
    assert vocabulary.types[:2] == [TokenType.CONTROL, TokenType.CONTROL]
    assert vocabulary.types[VOCABULARY:] == [TokenType.UNUSED] * 2
    assert len(set(vocabulary.tokens)) == VOCABULARY + 2
    assert vocabulary.ids == {"bos": 0, "eos": 0, "eot": 0, "pad": 1}  # no BOS: llama.cpp would take token 11
    assert (vocabulary.add_bos, vocabulary.add_eos) == (False, False)


def test_other_tokens_that_end_an_answer_are_named_and_too_many_are_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = read_vocabulary(tokenizer, VOCABULARY, stops=[0, 7, 9]).ids
    assert (ids["eos"], ids["eot"], ids["eom"]) == (0, 7, 9)
    with pytest.raises(UserError, match="a GGUF names two such tokens"):
        read_vocabulary(tokenizer, VOCABULARY, stops=[7, 8, 9])


def test_sentencepiece_is_told_by_scores_that_follow_the_merges() -> None:
    tokenizer = sentencepiece()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert (vocabulary.model, vocabulary.space_prefix, vocabulary.add_bos) == ("llama", True, True)
    assert vocabulary.types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert vocabulary.scores is not None
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    first, second = (tokenizer.convert_tokens_to_ids("".join(merge)) for merge in merges[:2])
    assert vocabulary.scores[first] > vocabulary.scores[second]


def test_no_space_before_any_piece_is_told_and_one_where_there_is_none_is_refused() -> None:
    tokenizer = sentencepiece("never")
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert (vocabulary.space_prefix, vocabulary.same_on_plain_text) == (False, True)
    with pytest.raises(UserError, match="its normalizer and pre-tokenizer are none that llama"):
        read_vocabulary(sentencepiece("always"), len(tokenizer))


def test_a_space_before_the_first_piece_alone_needs_prompts_that_open_with_a_special_token() -> None:
    tokenizer = sentencepiece("first")
    chat = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
    tokenizer.chat_template = "{{ bos_token }}" + chat
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert (vocabulary.space_prefix, vocabulary.same_on_plain_text) == (False, False)
    assert any("no leading space" in note for note in vocabulary.notes)
    tokenizer.chat_template = chat
    with pytest.raises(UserError, match="the chat template opens with text"):
        read_vocabulary(tokenizer, len(tokenizer))
