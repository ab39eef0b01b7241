"""The formats a row may have, told by its columns.

    messages             a list of {"role", "content"}: a conversation
    prompt, completion   a question and its answer (either may be a list of messages)
    text, label          something to classify
    text                 plain text to go on with

Besides, a ``task`` column may say which of several mixed tasks a row belongs to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from typing import Any

from veneer.errors import DataError, did_you_mean


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


def check_rows(rows: Iterable[Mapping[str, Any]], format: Format, where: str) -> None:
    """Check that every row has what its format needs.

    Raises:
        DataError: a row does not; the message names the row (counted from 1) and the column.
    """
    for number, row in enumerate(rows, start=1):
        for column in format.columns:
            problem = _problem(row.get(column), column)
            if problem:
                raise DataError(f"{where}, row {number}: {column!r} {problem}.")


def _problem(value: Any, column: str) -> str:
    if value is None:
        return "is missing"
    if column == "label":
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
    if must_answer and not any(message["role"] == "assistant" for message in value):
        return "has no turn of the assistant, so there is nothing to learn"
    return ""
