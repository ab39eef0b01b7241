"""Real prose that every Python brings along: paragraphs of its language reference."""

from __future__ import annotations

import random
from pydoc_data.topics import topics

CHARACTERS = range(100, 401)


def prose(held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of text to learn from and to hold out, some 50 tokens each, no two equal."""
    paragraphs = (" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n"))
    fitting = [text for text in dict.fromkeys(paragraphs) if len(text) in CHARACTERS and text[0].isalpha()]
    random.Random(0).shuffle(fitting)
    rows = [{"text": text} for text in fitting]
    return rows[held_out:], rows[:held_out]
