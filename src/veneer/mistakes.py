"""What is wrong with settings, in plain words: one mistake a setting, however many pydantic finds there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from veneer.errors import VeneerError

_Loc = tuple[str | int, ...]

_WANTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
"""pydantic's kind of mistake -> what should be there."""
_SHOULD = "Input should be "


@dataclass(frozen=True)
class Mistake:
    """A mistake in a setting.

    Attributes:
        path: of the setting; empty for several that don't go together.
        kind: pydantic's word for it.
        what: what is wrong, with what was given where that helps.
        given: what was given.
    """

    path: _Loc
    kind: str
    what: str
    given: Any = None

    def line(self, prefix: str) -> str:
        """For people; what a setting within the setting says of itself is told with its whole path."""
        where = prefix + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        where = where.removeprefix(".")
        if self.kind == "within":
            return re.sub(r"(^|; )method\b", lambda found: found[1] + where, self.what)
        return f"{where}: {self.what}" if where else self.what


def mistakes(error: ValidationError, depth: Callable[[_Loc], int]) -> list[Mistake]:
    """The mistakes pydantic found.

    Args:
        error: its error.
        depth: how many parts of a location are the setting's path; those behind it say which reading of it failed.
    """
    groups: dict[_Loc, list[Any]] = {}
    for problem in error.errors():
        loc = problem["loc"]
        groups.setdefault(loc[: depth(loc)], []).append(problem)
    return [
        _mistake(path, problems)
        for path, problems in groups.items()
        # What is left of a list without its bad parts is no mistake of its own.
        if problems[0]["type"] != "too_short"
        or not any(len(other) > len(path) == _shared(other, path) for other in groups)
    ]


def _shared(one: _Loc, other: _Loc) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _mistake(path: _Loc, problems: Sequence[Any]) -> Mistake:
    deepest = max(len(problem["loc"]) for problem in problems)  # the reading that came furthest was meant
    problems = [problem for problem in problems if len(problem["loc"]) == deepest]
    first = problems[0]
    kind = first["type"]
    if kind == "missing":
        return Mistake(path, kind, "is missing")
    if kind == "too_short":
        least = first["ctx"]["min_length"]
        return Mistake(path, kind, f"should have at least {'one' if least == 1 else least}")
    if kind == "value_error":
        raised = first["ctx"]["error"]
        if isinstance(raised, VeneerError) and path:
            within = str(raised).startswith("method")
            return Mistake(path, "within" if within else kind, str(raised))
        return Mistake(path, kind, f"{raised} (got {first['input']!r})" if path else str(raised))
    wanted = [_WANTED.get(each["type"]) or each["msg"].removeprefix(_SHOULD) for each in problems]
    if all(each["type"] in _WANTED or each["msg"].startswith(_SHOULD) for each in problems):
        what = f"should be {' or '.join(dict.fromkeys(wanted))} (got {first['input']!r})"
        return Mistake(path, kind, what, first["input"])
    return Mistake(path, kind, f"{first['msg'][:1].lower()}{first['msg'][1:]} (got {first['input']!r})")
