"""What a forward of the whole model knows that a module's own input doesn't tell, and deltas that ask for it.

Beside     y ← δ(x', y)        x' the input of another module, recorded when that one was called
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from veneer.deltas.base import Delta
from veneer.deltas.rows import repeated, runs


class Remembers(Protocol):
    """A memory of earlier steps."""

    def extend(self, key: object, opened: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Keep ``[rows, positions]`` of a step; the sums over the steps before, ``[rows, 1]`` each."""


@dataclass(eq=False)
class Flow:
    """One forward.

    Attributes:
        rows: how many rows it has; None where a module is called by itself and nobody knows.
        wanted: paths of the modules whose inputs are recorded.
        inputs: what these got last.
        mask: which positions of the input are real, ``[rows, positions]``; None for all.
        decoder_mask: the same of a decoder's, where there is an encoder, too.
        memory: of what gates let through in earlier steps of a generation.
        places: where the input's tokens stand among virtual ones, ``[rows, tokens]``; None without such.
    """

    rows: int | None = None
    mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    memory: Remembers | None = None
    wanted: set[str] = field(default_factory=set)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None

    def record(self, path: str, x: Tensor) -> None:
        """Keep a module's input, if anyone wants it."""
        if path in self.wanted:
            self.inputs[path] = x


@dataclass(frozen=True)
class Among:
    """Which rows of a batch a delta is for, where modules see all of them along an axis.

    Attributes:
        rows: their places.
        count: rows of the batch.
        axis: of the rows in what a module sees; None where the module is run on these rows alone.
    """

    rows: Sequence[int]
    count: int
    axis: int | None

    def of(self, x: Tensor) -> Tensor:
        """These rows of what a module saw, rows first."""
        if self.axis is None:
            return x
        index = repeated(self.rows, runs(x, self.axis, self.count), x.device)
        return x.transpose(0, self.axis).index_select(0, index)


@dataclass(frozen=True, eq=False)
class Beside(Delta):
    """A delta that gets another module's input in place of its own module's.

    Args:
        delta: which acts on the output only.
        source: path of that module; it is called earlier in the same forward.
        flow: of that forward.
        among: the rows it is for; None for all.
    """

    delta: Delta
    source: str
    flow: Flow
    among: Among | None = None

    def __post_init__(self) -> None:
        self.flow.wanted.add(self.source)

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """The delta's, of the recorded input."""
        recorded = self.flow.inputs[self.source]
        return self.delta.apply(recorded if self.among is None else self.among.of(recorded), y)

    def for_rows(self, among: Among) -> Delta:
        """The same rows of what was recorded."""
        return replace(self, among=among)

    def changes(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the delta does."""
        return self.delta.changes(parameters)

    @property
    def nbytes(self) -> int:
        """Of the delta."""
        return self.delta.nbytes

    @property
    def flops_per_token(self) -> int:
        """Of the delta."""
        return self.delta.flops_per_token
