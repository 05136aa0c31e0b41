"""A tokenizer as llama.cpp reads it. What it would split otherwise is refused.

llama.cpp knows two kinds that these families use: byte-level BPE, whose splitting into words it knows by a name alone,
and SentencePiece's BPE, whose merges it knows by scores.
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (`llm_tokenizer_bpe`, `llama_vocab::impl::load`)
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from plainlora.data.prompts import adds_bos
from plainlora.errors import UserError
from plainlora.export.chat_template import llama_cpp_template, opens_with

Splitting = tuple[tuple[Any, ...], ...]
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_GPT2 = ("ByteLevel", False, True)
_BYTES = ("ByteLevel", False, False)

# `tokenizer.ggml.pre` by what tokenizer.json does: how it splits text, and whether a whole word needs no merges.
PRE_TOKENIZERS: dict[tuple[Splitting, bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", _QWEN2, "Isolated", False), _BYTES), False): "qwen2",
    ((("Split", _LLAMA3, "Isolated", False), _BYTES), False): "dbrx",
    ((("Split", _LLAMA3, "Isolated", False), _BYTES), True): "llama-bpe",
}

# Texts of tokens that end an answer in llama.cpp, whatever the file says of them (llama-vocab.cpp, `special_eog_ids`).
ENDINGS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of the tokenizer.

    Attributes:
        model: `gpt2` for byte-level BPE, `llama` for SentencePiece.
        pre: The name of the splitting into words.
        tokens: The text of each token.
        types: The `TokenType` of each.
        merges: Of byte-level BPE, `left right`; else `None`.
        scores: Of SentencePiece: the higher, the earlier a token is merged; else `None`.
        ids: The special tokens by their roles: bos, eos, eot, eom, pad, unk.
        add_bos: Whether a BOS stands before every text.
        add_eos: Whether an EOS stands after every text.
        space_prefix: Whether a space is written before a text and after each special token; `None` for byte-level BPE.
        template: The chat template.
        notes: What a user of the file should know.
        same_on_plain_text: Whether text without a chat template gets the same tokens too.
        misread: Words that llama.cpp takes for special tokens by their names; other text is split the same.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool | None
    template: str
    notes: list[str] = field(default_factory=list)
    same_on_plain_text: bool = True
    misread: list[str] = field(default_factory=list)

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Writes the keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        for role, number in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        writer.add_chat_template(self.template)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, stops: Iterable[int] = ()) -> Vocabulary:
    """The vocabulary of a tokenizer for a model.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library.
        rows: Rows of the model's embedding. Those without a token get a name of their own.
        stops: Tokens besides the tokenizer's EOS at which the model's answers end.

    Raises:
        UserError: llama.cpp would split text otherwise, end answers elsewhere, or render another prompt.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    name = tokenizer.name_or_path
    if backend is None:
        raise UserError(f"{name} is no tokenizer of the tokenizers library, and only those can be written into a GGUF")
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "BPE":
        raise UserError(f"{name} is a {content['model']['type']} tokenizer; of GGUF's kinds only BPE is written here")
    _check_added(tokenizer)
    ids, notes = _special_ids(tokenizer, stops)
    template, note = llama_cpp_template(tokenizer)
    notes += note
    scores = merges = space = None
    same = True
    if content["model"]["byte_fallback"]:
        model, pre = "llama", "default"
        space, same = _space_prefix(tokenizer, content)
        scores = _scores(content, rows)
        if not same:
            notes.append("text without the chat template gets no leading space in llama.cpp, and does in Transformers")
    else:
        model, pre = "gpt2", _pre_tokenizer(name, content)
        merges = [" ".join(_pair(each)) for each in content["model"]["merges"]]
        if content["normalizer"] is not None:
            notes.append("llama.cpp does not compose accents (NFC): text that is not in NFC gets other tokens")
    tokens, types = _tokens(tokenizer, content, rows)
    misread = [text for text, kind in zip(tokens, types, strict=True) if text in ENDINGS and kind == TokenType.NORMAL]
    if misread:
        notes.append(f"llama.cpp takes {', '.join(misread)} in a text for a special token, by its name")
    encoded = tokenizer("a").input_ids
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        scores=scores,
        ids=ids,
        add_bos=adds_bos(tokenizer),
        add_eos=encoded[-1:] == [tokenizer.eos_token_id],
        space_prefix=space,
        template=template,
        notes=notes,
        same_on_plain_text=same,
        misread=misread,
    )


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _check_added(tokenizer: PreTrainedTokenizerBase) -> None:
    for token in tokenizer.added_tokens_decoder.values():
        for flag in ("lstrip", "rstrip", "single_word"):
            if getattr(token, flag):
                raise UserError(
                    f"{tokenizer.name_or_path}: the token {token.content!r:.40} has {flag}, which llama.cpp does not "
                    "read from a file, so that text around it would be split otherwise; it cannot be exported"
                )


def _special_ids(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int]) -> tuple[dict[str, int], list[str]]:
    """The special tokens by their roles, and what to know of where answers end.

    All are written: what a file leaves out, llama.cpp takes from defaults, such as token 11 for a BOS, or finds by its
    text, in an order that is not fixed.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            f"{tokenizer.name_or_path} has no EOS token, and llama.cpp would take another one for it; set eos_token "
            "in its tokenizer_config.json"
        )
    texts = {number: str(tokenizer.convert_ids_to_tokens(number)) for number in {*stops, eos}}
    others = sorted(number for number, text in texts.items() if number != eos and text not in ENDINGS)
    if len(others) > 2:
        raise UserError(
            f"{tokenizer.name_or_path}: answers end at {', '.join(repr(texts[each]) for each in others)} besides "
            f"{texts[eos]!r}, and a GGUF names two such tokens; take some out of generation_config.json"
        )
    ids = {
        "bos": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos,
        "eos": eos,
        "eot": others[0] if others else eos,
        **({"eom": others[1]} if len(others) > 1 else {}),
        "pad": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos,
        **({"unk": tokenizer.unk_token_id} if tokenizer.unk_token_id is not None else {}),
    }
    more = sorted(text for text, number in tokenizer.get_vocab().items() if text in ENDINGS and number not in texts)
    return ids, [f"llama.cpp also ends an answer at {', '.join(more)}, by its name"] if more else []


def _flattened(pre_tokenizer: dict[str, Any] | None) -> Splitting:
    """A pre-tokenizer of tokenizer.json as its steps, each with what of it changes the result."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for each in pre_tokenizer["pretokenizers"] for step in _flattened(each))
    if kind == "ByteLevel":
        return (("ByteLevel", pre_tokenizer["add_prefix_space"], pre_tokenizer["use_regex"]),)
    if kind == "Digits":
        return (("Digits", pre_tokenizer["individual_digits"]),)
    if kind == "Split":
        pattern = pre_tokenizer["pattern"].get("Regex")
        return (("Split", pattern, pre_tokenizer["behavior"], pre_tokenizer["invert"]),)
    return ((kind, json.dumps(pre_tokenizer, sort_keys=True)),)


def _pre_tokenizer(name: str, content: dict[str, Any]) -> str:
    model, normalizer = content["model"], content["normalizer"]
    splitting = _flattened(content["pre_tokenizer"])
    found = PRE_TOKENIZERS.get((splitting, bool(model["ignore_merges"])))
    unusual = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model[key]]
    if normalizer not in (None, {"type": "NFC"}):
        unusual.append(f"normalizer {normalizer['type']}")
    if found is None or unusual:
        steps = " then ".join(str(step[0]) for step in splitting) or "not at all"
        raise UserError(
            f"{name}/tokenizer.json splits text by {steps}{', with ' + ', '.join(unusual) if unusual else ''}, which "
            f"is none of what llama.cpp is known here to do ({', '.join(PRE_TOKENIZERS.values())}): it would split "
            "text otherwise, so no GGUF is written"
        )
    return found


def _space_prefix(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> tuple[bool, bool]:
    """Whether llama.cpp is to write a space before text, and whether plain text then gets the same tokens.

    llama.cpp writes it before every piece of text between special tokens, as the normalizer `Prepend` does.
    Transformers' `prepend_scheme: first` writes it before the first alone: a prompt that opens with a special token
    then has none. Its `always` writes none where there already is one, which llama.cpp does not.
    """
    normalizer, splitting = content["normalizer"], content["pre_tokenizer"]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if splitting is None and normalizer == {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced],
    }:
        return True, True
    if splitting is None and normalizer == replaced:
        return False, True
    metaspace = normalizer is None and splitting is not None and splitting["type"] == "Metaspace"
    if metaspace and not splitting["split"] and splitting["prepend_scheme"] == "never":
        return False, True
    if metaspace and not splitting["split"] and splitting["prepend_scheme"] == "first":
        if opens_with(tokenizer, {token.content for token in tokenizer.added_tokens_decoder.values()}):
            return False, False
        raise UserError(
            f"{tokenizer.name_or_path}: Transformers writes a space before the first piece of a text alone, llama.cpp "
            "before all or none, and the chat template opens with text: prompts would be split otherwise; no GGUF is "
            "written"
        )
    raise UserError(
        f"{tokenizer.name_or_path}/tokenizer.json: its normalizer and pre-tokenizer are none that llama.cpp is known "
        "here to follow; no GGUF is written"
    )


def _scores(content: dict[str, Any], rows: int) -> list[float]:
    """Scores by which llama.cpp merges in the order of tokenizer.json: minus the place of a token among the results.

    Raises:
        UserError: The merges that make one token do not follow each other, which one score a token cannot tell.
    """
    vocabulary = content["model"]["vocab"]
    results = ["".join(_pair(each)) for each in content["model"]["merges"]]
    order = list(dict.fromkeys(results))
    places = {token: place for place, token in enumerate(order)}
    if any(places[later] < places[earlier] for earlier, later in pairwise(results)):
        raise UserError("tokenizer.json merges in an order that scores of tokens cannot tell; no GGUF is written")
    scores = [0.0] * rows
    for token, number in vocabulary.items():
        if number < rows:
            scores[number] = -float(places.get(token, len(order)))
    return scores


def _tokens(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    texts: list[str] = [f"[UNUSED {number}]" for number in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, number in content["model"]["vocab"].items():
        if number < rows:
            texts[number], types[number] = token, int(TokenType.NORMAL)
    if content["model"]["byte_fallback"]:
        for byte in range(256):
            number = content["model"]["vocab"].get(f"<0x{byte:02X}>")
            if number is None:
                raise UserError(f"{tokenizer.name_or_path} has no token for the byte {byte}; no GGUF is written")
            types[number] = int(TokenType.BYTE)
    for number, token in tokenizer.added_tokens_decoder.items():
        if number < rows:
            texts[number] = token.content
            types[number] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    if content["model"]["byte_fallback"] and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    if len(set(texts)) < rows:
        raise UserError(f"{tokenizer.name_or_path} has two tokens of one text; no GGUF is written")
    return texts, types
