"""Finds what a chat template leaves out of a conversation: a template drops roles and fields that it does not know.

Every text of a conversation is replaced by a mark of its own and the conversation is rendered. The texts whose marks
are missing are left out. Conversations with the same outline (roles and fields) are rendered once.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from plainlora.data.layouts import CALLS, THINKING
from plainlora.data.prompts import Message, render
from plainlora.errors import UserError

Kind = Literal["answer", "message", "tool call", "tools", "template options", "roles", "thinking", "fields", "quoted"]
QUOTED = json.dumps(json.dumps({"key": ""}))[1:-4]  # how arguments begin that were encoded as JSON twice
THOUGHT = "</think>"  # ends the thinking of DeepSeek-R1, Qwen3 and others inside the content
KNOWN = {"role", "content", *CALLS, *THINKING}  # a message's fields that are marked


@dataclass(frozen=True)
class Omission:
    """Something that the chat template leaves out of rows.

    Attributes:
        kind: The kind of text that is left out. A row without its `answer` must not be trained on.
        what: A clause that describes it.
        rows: Number of rows without it.
        first: Number of the first such row, from 1.
    """

    kind: Kind
    what: str
    rows: int
    first: int


class _Marks:
    """Marks in place of texts, each with the number of its message and the kind of text."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int, str]] = []
        self.ids: dict[str, str] = {}

    def new(self, at: int, kind: str) -> str:
        self.made.append((f"Qx{len(self.made)}xQ", at, kind))
        return self.made[-1][0]

    def id(self, written: str) -> str:
        """The same ids in every row; nine letters, as Mistral's templates demand."""
        return self.ids.setdefault(written, f"id{len(self.ids):07}")

    def reached(self, text: str, at: int, kind: str) -> list[bool]:
        """Whether each mark of this kind is in the text."""
        return [mark in text for mark, message, name in self.made if (message, name) == (at, kind)]


def _outline(message: Message, at: int, marks: _Marks) -> Message:
    """The message with a mark in place of each text."""
    outline = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        thought, end, rest = content.rpartition(THOUGHT)
        head = f"{'<think>' if '<think>' in thought else ''}{marks.new(at, 'thinking')}{THOUGHT}\n\n" if end else ""
        outline["content"] = head + (marks.new(at, "content") if rest.strip() else "")
    elif isinstance(content, list):
        outline["content"] = [
            part | {"text": marks.new(at, "content")} if isinstance(part, dict) and part.get("text") else part
            for part in content
        ]
    elif isinstance(content, dict):
        outline["content"] = {key: marks.new(at, "content") for key in content}
    thinking = [key for key in THINKING if isinstance(message.get(key), str) and message[key].strip()]
    if thinking:
        outline |= dict.fromkeys(thinking, marks.new(at, "thinking"))  # the same thought under several names
    if isinstance(message.get("tool_call_id"), str):
        outline["tool_call_id"] = marks.id(message["tool_call_id"])
    if isinstance(message.get("tool_calls"), list):
        outline["tool_calls"] = [_outline_call(call, at, marks) for call in message["tool_calls"]]
    if isinstance(message.get("function_call"), dict):
        outline["function_call"] = _outline_call(message["function_call"], at, marks)
    return outline


def _outline_call(call: Any, at: int, marks: _Marks) -> Any:
    if not isinstance(call, dict):
        return call
    outline = dict(call)
    if isinstance(call.get("id"), str):
        outline["id"] = marks.id(call["id"])
    if isinstance(call.get("function"), dict):
        outline["function"] = _outline_call(call["function"], at, marks)
    if isinstance(call.get("name"), str):
        outline["name"] = marks.new(at, "tool call")
    if isinstance(call.get("arguments"), dict):
        outline["arguments"] = {key: marks.new(at, "tool call") for key in call["arguments"]}
    elif isinstance(call.get("arguments"), str):
        outline["arguments"] = json.dumps({"key": marks.new(at, "tool call")})
    return outline


def _outline_tools(marks: _Marks) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "it"}}, "required": []}
    function = {"name": marks.new(-1, "tools"), "description": "It does it.", "parameters": parameters}
    return [{"type": "function", "function": function}]


class Coverage:
    """Finds what the chat template leaves out of a conversation.

    Args:
        tokenizer: A tokenizer with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[tuple[Kind, str]]] = {}

    def __call__(self, messages: list[Message], options: dict[str, Any]) -> list[tuple[Kind, str]]:
        """The omissions, each as its kind and a clause that describes it.

        Args:
            messages: The whole conversation.
            options: The template's other variables, and possibly a `chat_template` to use instead of the tokenizer's.
        """
        marks = _Marks()
        outline = [_outline(message, at, marks) for at, message in enumerate(messages)]
        given = options | ({"tools": _outline_tools(marks)} if options.get("tools") else {})
        key = json.dumps([outline, given], default=str)
        if key not in self.known:
            try:
                text = render(outline, self.tokenizer, options=given)
            except UserError:  # the template checks the texts, and refuses the marks
                return []
            self.known[key] = [*_lost(outline, marks, text, self._words(given)), *self._unread(outline, given)]
        return self.known[key]

    def _words(self, given: dict[str, Any]) -> set[str]:
        """The words of the template's source. The template reads no variable whose name is not among them."""
        source = self.tokenizer.get_chat_template(given.get("chat_template"), given.get("tools"))
        return set(re.findall(r"\w+", source))

    def _unread(self, outline: list[Message], given: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
        words = self._words(given)
        for name in sorted(set(given) - {"chat_template", "tools"} - words):
            yield "template options", f"the chat template does not read {name!r} of chat_template_kwargs"
        for name in sorted({key for message in outline for key in message} - KNOWN - words):
            yield "fields", f"the chat template does not read the messages' field {name!r}"
        if not any(message["role"] == "assistant" for message in outline):
            roles = ", ".join(dict.fromkeys(message["role"] for message in outline))
            yield "roles", f"no message is the assistant's (the roles are {roles})"


def _lost(outline: list[Message], marks: _Marks, text: str, words: set[str]) -> Iterator[tuple[Kind, str]]:
    answers = [at for at, message in enumerate(outline) if message["role"] == "assistant"]
    last = answers[-1] if answers else len(outline) - 1  # as in `split_row`
    thinks = bool({*THINKING, "think"} & words)  # then it may strip earlier thoughts on purpose
    for at, message in enumerate(outline):
        role = message["role"]
        content, call, thought = (marks.reached(text, at, kind) for kind in ("content", "tool call", "thinking"))
        turn = content + call or thought * (at == last)
        if (role == "assistant" or at == last) and turn and not any(turn):
            what = "tool call" if call else "content" if content else "thinking"
            yield "answer", f"the chat template leaves out the {role}'s {what}"
            continue
        if not all(content):
            yield "message", f"the chat template leaves out the {role} message"
        if not all(call):
            yield "tool call", f"the chat template leaves out the {role}'s tool call"
        if not all(thought) and not thinks:
            yield "message", f"the chat template leaves out the {role}'s thinking"
        elif not all(thought) and at == last:
            yield "thinking", f"the chat template strips the {role}'s thinking"
        if isinstance(message.get("content"), list):
            kinds = {str(part.get("type")) for part in message["content"] if isinstance(part, dict)} - {"text"}
            for kind in sorted(kinds):
                yield "message", f"the {role} message holds {kind}, which a model of text is not shown"
            if str(message["content"]) in text:
                yield "message", f"the chat template prints the parts of the {role} message as a list"
    if QUOTED in text:
        yield "quoted", "the chat template writes the arguments of a tool call, which are JSON text, as a quoted text"
    if not all(marks.reached(text, -1, "tools")):
        yield "tools", "the chat template leaves out the tools"
