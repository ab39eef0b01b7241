"""The formats a row may have, told by its columns.

    messages             a list of {"role", "content"}: a conversation
    prompt, completion   a question and its answer (either may be a list of messages)
    text, label          something to classify
    text                 plain text to go on with

Besides, a ``task`` column may say which of several mixed tasks a row belongs to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from veneer.errors import DataError, did_you_mean

TASK = "task"
"""The column that says which of several tasks a row belongs to: by name, or as a vector."""


def task_told(value: Any) -> Any:
    """What a row's task column says: a name as text, numbers too, a vector as it is, or None if it says nothing."""
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():  # whole numbers are read as such where some are missing
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value


class Format(Enum):
    """A row format, by the columns it needs."""

    MESSAGES = ("messages",)
    PROMPT_COMPLETION = ("prompt", "completion")
    TEXT_LABEL = ("text", "label")
    TEXT = ("text",)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it needs."""
        return self.value


def detect(columns: Collection[str], where: str = "the data") -> Format:
    """The format of rows with these columns.

    Raises:
        DataError: none fits; the message names the columns there are and the nearest ones needed.
    """
    for format in Format:
        if set(format.columns) <= set(columns):
            return format
    known = sorted({column for format in Format for column in format.columns})
    hints = "".join(did_you_mean(column, known, limit=1) for column in columns)
    raise DataError(
        f"{where} has the columns {', '.join(columns) or '(none)'}. Needed: messages, or prompt and completion, "
        f"or text and label, or text.{hints} Other names can be mapped: columns={{prompt: question}}."
    )


def problems(rows: Iterable[Mapping[str, Any]], format: Format) -> Iterator[tuple[int, str]]:
    """What rows lack that their format needs: pairs of a row's index and what is wrong with it."""
    for index, row in enumerate(rows):
        for column in format.columns:
            problem = _problem(row.get(column), column)
            if problem:
                yield index, f"{column!r} {problem}"


def asked_and_answered(row: Mapping[str, Any], format: Format) -> tuple[str, str]:
    """A row as plain text: what is asked, and what is answered (the empty string for plain text)."""
    if format is Format.MESSAGES:
        turns = list(row["messages"])
        last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
        return _plain(turns[:last]), "" if last == len(turns) else _content(turns[last])
    if format is Format.PROMPT_COMPLETION:
        return _plain(row["prompt"]), _plain(row["completion"])
    return str(row["text"]), str(row["label"]) if format is Format.TEXT_LABEL else ""


def _plain(value: str | Sequence[Mapping[str, Any]]) -> str:
    return value if isinstance(value, str) else "\n".join(f"{turn['role']}: {_content(turn)}" for turn in value)


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    return "" if content is None else str(content)


def _problem(value: Any, column: str) -> str:
    if value is None:
        return "is missing"
    if column == "label":
        if value == "":
            return "is empty"
        return "" if isinstance(value, str | int | bool) else f"is {value!r}; a label is a string or an integer"
    if column == "messages" or isinstance(value, list):
        return _messages_problem(value, must_answer=column == "messages")
    if not isinstance(value, str):
        return f"is a {type(value).__name__}, not text"
    return "is empty" if not value.strip() else ""


def _messages_problem(value: Any, *, must_answer: bool) -> str:
    if not isinstance(value, list) or not value:
        return "is no list of messages"
    for message in value:
        if not isinstance(message, Mapping) or not message.get("role"):
            return f"holds {message!r}, which is no {{role, content}}"
        if message.get("content") is None and not message.get("tool_calls"):
            return f"holds a turn of {message['role']!r} without content"
    if must_answer and not any(message["role"] == "assistant" for message in value):
        roles = {str(message["role"]) for message in value}
        hints = "".join(did_you_mean(role, ["assistant"]) for role in sorted(roles))
        return f"has no turn of the assistant, so there is nothing to learn.{hints} Roles: {', '.join(sorted(roles))}"
    return ""
