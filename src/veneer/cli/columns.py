"""What several commands' options have in common."""

from __future__ import annotations

from collections.abc import Sequence

from cyclopts.validators import Number

from veneer.errors import ConfigError

POSITIVE = Number(gte=1)


def mapping(pairs: Sequence[str]) -> dict[str, str]:
    """``("prompt=question",)`` -> ``{"prompt": "question"}``.

    Raises:
        ConfigError: a pair has no ``=``.
    """
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ConfigError(f"--columns {wrong[0]}: write OUR_NAME=ITS_NAME, e.g. prompt=question.")
    return dict(pair.split("=", 1) for pair in pairs)
