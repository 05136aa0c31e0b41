"""The layouts that a row may have: its prompt, its answer, and the variables for the chat template."""

import inspect
import json
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

from plainlora.data.datasets import check_text_columns
from plainlora.data.prompts import Message, assistant_message, user_message
from plainlora.errors import UserError

Schema = Literal["messages", "prompt", "instruction", "text"]

# Names of a message's thinking: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/chat_template_utils.py
THINKING = ("reasoning_content", "thinking", "reasoning")

# Names of a message's calls; the second is OpenAI's older one.
CALLS = ("tool_calls", "function_call")

# Arguments of `apply_chat_template`, which a row's chat_template_kwargs must not set.
CALL = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    *("tools", "documents", "chat_template", "kwargs")
}


def find_schema(rows: Dataset, text_column: str, where: str) -> Schema:
    """The layout of a dataset's rows, whose text columns are checked.

    ShareGPT's `conversations` are `messages` by another name.

    Raises:
        UserError: No layout fits (the columns are listed), a row lacks a field, or there are images.
    """
    columns = rows.column_names
    for column in {"image", "images"} & set(columns):
        raise UserError(
            f"{where}: the column {column!r} needs a vision model, and this program trains on text; remove it"
        )
    if {"prompt", "completion"} <= set(columns):
        return "prompt"
    if {"messages", "conversations"} & set(columns):
        return "messages"
    if {"instruction", "output"} <= set(columns):
        check_text_columns(rows, ["instruction", "output"], where)
        if "input" in columns:
            check_text_columns(rows, ["input"], where, optional=True)
        return "instruction"
    if text_column in columns:
        check_text_columns(rows, [text_column], where)
        return "text"
    if len(columns) == 1 and len(rows) == 1 and isinstance(rows[0][columns[0]], list):
        raise UserError(f"{where} is one object that holds a list, {columns[0]!r}; give a file that is that list")
    raise UserError(
        f"{where} has the columns {', '.join(columns)}; needed are instruction and output, prompt and completion, "
        f"messages or conversations, or {text_column!r} (set dataset_text_field for another name)"
    )


def unread_columns(rows: Dataset, schema: Schema, text_column: str) -> list[str]:
    """Columns that neither the layout nor the chat template uses."""
    read = {
        "prompt": {"prompt", "completion"},
        "messages": {"messages" if "messages" in rows.column_names else "conversations"},
        "instruction": {"instruction", "input", "output"},
        "text": {text_column},
    }[schema]
    if is_rendered(rows[0], schema):
        read |= {"tools", "chat_template_kwargs"}
    return [column for column in rows.column_names if column not in read]


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def text_pair(row: dict[str, Any], schema: Schema) -> tuple[str, str] | None:
    """The prompt and the completion of a row that has both as plain text, without a template (as in TRL)."""
    if schema == "prompt" and isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return row["prompt"], row["completion"]
    return None


def is_rendered(row: dict[str, Any], schema: Schema) -> bool:
    """Whether the row is rendered by the chat template."""
    return schema != "text" and text_pair(row, schema) is None


def split_row(row: dict[str, Any], schema: Schema) -> tuple[list[Message], list[Message]]:
    """The row's prompt and its answer as chat messages.

    The answer of a conversation begins with its last assistant message; if there is none, it is the last message.
    Rows of plain text have no messages: see `text_pair`.

    Raises:
        UserError: The row's messages are not a conversation.
    """
    if schema == "instruction":
        return [user_message(row["instruction"], row.get("input") or "")], [assistant_message(row["output"])]
    if schema == "prompt":
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, list) or not isinstance(completion, list):
            types = " and ".join(_type_name(side) for side in (prompt, completion))
            raise UserError(f"'prompt' and 'completion' must be two texts or two lists of messages, not {types}")
        return _as_messages(prompt), _as_messages(completion)
    name = "messages" if "messages" in row else "conversations"
    if not isinstance(row[name], list) or not row[name]:
        what = "empty" if row[name] == [] else _type_name(row[name])
        advice = "; give a json, jsonl or parquet file, which hold lists" if isinstance(row[name], str) else ""
        raise UserError(f"{name!r} must be a list of messages, not {what}{advice}")
    messages = _as_messages(row[name])
    last = max(
        (at for at, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages) - 1
    )
    return messages[:last], messages[last:]


def _as_messages(conversation: list[Any]) -> list[Message]:
    """Checked messages with a role and a content, converted from ShareGPT's `from` and `value` if need be."""
    copies = [dict(message) if isinstance(message, dict) else message for message in conversation]
    messages: list[Message] = maybe_convert_to_chatml({"messages": copies})["messages"]
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str | list | dict | None)
        ):
            raise UserError(f"a message needs a role and a content, both text (or parts of text), not {message!r}")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise UserError(f"'tool_calls' must be a list of calls, each an object, not {calls!r}")
        if all(value is None for key, value in message.items() if key != "role"):
            raise UserError(f"a message needs a content or tool_calls beside its role, not {message!r}")
    return messages


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """The chat template's variables beside the messages: the row's `tools` and `chat_template_kwargs`, as in TRL.

    https://huggingface.co/docs/trl/v1.16.0/en/dataset_formats#tool-calling

    Raises:
        UserError: `tools` is not a list of functions (or its JSON), or `chat_template_kwargs` is not an object.
    """
    tools, given = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"'tools' is text, but not JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"'tools' must be a list of JSON schemas of functions, not {tools!r}")
    if not isinstance(given, dict | None):
        raise UserError(f"'chat_template_kwargs' must be an object, not {_type_name(given)}")
    if reserved := CALL & set(given or {}):
        raise UserError(f"'chat_template_kwargs' sets {min(reserved)!r}, which is not a variable of a chat template")
    return {"tools": tools, **(given or {})}


def text_of(content: Any) -> str:
    """A message's content as text: a list's texts joined, an object as JSON, null as the empty text."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) if content else ""


def has_answer(row: dict[str, Any], schema: Schema) -> bool:
    """Whether the answer is more than white space. Plain text counts as answered: its answer cannot be separated."""
    if schema == "text":
        return True
    texts = text_pair(row, schema)
    if texts is not None:
        return bool(texts[1].strip())
    answer = split_row(row, schema)[1]
    return any(text_of(message.get(key)).strip() for message in answer for key in ("content", *CALLS, *THINKING))


def prompts_of(rows: Dataset, schema: Schema, text_column: str) -> list[str]:
    """The prompt of each row, to compare rows; the answer if it is empty, the whole text if both are not separate."""
    if schema == "text":
        return [text.strip() for text in rows[text_column]]
    asked = []
    for row in rows:
        prompt, answer = text_pair(row, schema) or split_row(row, schema)
        shown = prompt or answer
        asked.append(shown if isinstance(shown, str) else json.dumps(shown, sort_keys=True))
    return asked
