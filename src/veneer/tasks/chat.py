"""Conversations as a base's chat template writes them, cut into what is learned and what is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from veneer.errors import ConfigError, DataError

Segment: TypeAlias = tuple[str, bool]
"""A piece of text, and whether it is learned."""


def chat_segments(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Segment]:
    """Cut the template's rendering of a conversation before and after each turn of the assistant.

    Raises:
        DataError: the template refuses the conversation, or rewrites earlier turns when later ones come.
    """

    def render(upto: int, *, ask: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # templates are programs: anything may come out of them
            raise DataError(f"The base's chat template refuses this conversation: {error}") from error

    if not tokenizer.chat_template:
        raise ConfigError("This base has no chat template; set task.template=plain, or use another base.")
    segments: list[Segment] = []
    done = ""

    def add(text: str, learned: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise DataError("The base's chat template changes earlier turns, so answers cannot be told apart in it.")
        segments.append((text[len(done) :], learned))
        done = text

    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            add(render(index, ask=True), False)
            add(render(index + 1, ask=False), True)
    if messages[-1]["role"] != "assistant":
        add(render(len(messages), ask=True), False)
    return segments


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row as a conversation, without the empty fields that tabular storage adds."""
    if row.get("messages"):
        turns = row["messages"]
    else:
        prompt, completion = row["prompt"], row.get("completion")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if completion is not None:
            turns += [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def content_of(value: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt or completion as text, a line a message."""
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)
