"""Every error veneer raises on purpose.

Each message says what is wrong, where, and what to do about it. A domain error also subclasses the standard
error it refines, so that ``except ValueError`` or ``except OSError`` written by a caller keeps working.

    VeneerError
    ├── ConfigError        (ValueError)   a config key, value or combination
    ├── UnknownName        (LookupError)  a method, task, model or adapter nobody registered
    ├── TargetError        (ValueError)   targets that match nothing in the base
    ├── BaseError          (ValueError)   something that cannot serve as a base
    │   └── BaseMismatch                  an adapter made for another base
    ├── AdapterError       (ValueError)   attaching, activating or reading an adapter
    │   └── AdapterFileError              a folder that is no intact adapter
    ├── DataError          (ValueError)   a data file or a row in it
    ├── TrainingError      (ArithmeticError)  a run whose loss is no longer a number
    ├── OutputError        (OSError)      something in the way of what is to be written
    └── FetchError         (OSError)      a download that could not be had

`Interrupted` is no error but a `KeyboardInterrupt`: a run that was asked to stop, and did so in good order.
`VeneerWarning` (`UserWarning`) is what works, and is probably not what was meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """Root of the tree: catch it to catch everything veneer raises on purpose."""


class ConfigError(VeneerError, ValueError):
    """A config key, value or combination of them is wrong."""


class UnknownName(VeneerError, LookupError):
    """A method, task, model or adapter of that name is not known."""


class TargetError(VeneerError, ValueError):
    """Targets match nothing, or less than was asked for, in this base."""


class BaseError(VeneerError, ValueError):
    """Something given as a base cannot serve as one."""


class BaseMismatch(BaseError):
    """The adapter was made for another base."""


class AdapterError(VeneerError, ValueError):
    """An adapter cannot be attached, activated or read."""


class AdapterFileError(AdapterError):
    """A folder is not an intact adapter."""


class DataError(VeneerError, ValueError):
    """A data file, or a row in it, is not what the task needs."""


class TrainingError(VeneerError, ArithmeticError):
    """A training run cannot go on: its loss is no longer a number, or has run away.

    Attributes:
        rows: indices of the training examples' rows it happened on, as far as known.
        diverged: whether the weights are spoilt, so that there is nothing to go on from.
    """

    def __init__(self, message: str, rows: Iterable[int] = (), *, diverged: bool = False) -> None:
        super().__init__(message)
        self.rows = tuple(rows)
        self.diverged = diverged


class OutputError(VeneerError, OSError):
    """Something stands in the way of what is to be written."""


class FetchError(VeneerError, OSError):
    """Something to be downloaded could not be had, or is not what was pinned."""


class VeneerWarning(UserWarning):
    """Something that works, and is probably not what was meant."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop (Ctrl-C, SIGTERM) and did, after a whole step; the message says how to go on."""


def did_you_mean(wrong: str, known: Iterable[str], *, limit: int = 3) -> str:
    """``" Did you mean 'rank'?"``, or the empty string when nothing is near."""
    near = difflib.get_close_matches(wrong, list(known), n=limit, cutoff=0.55)
    if not near:
        return ""
    return f" Did you mean {' or '.join(repr(name) for name in near)}?"
