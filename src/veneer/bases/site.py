"""One place where something can act."""

from __future__ import annotations

import re
from dataclasses import dataclass

from veneer.errors import TargetError

EMBEDDING = "embedding"
EXPERTS = "experts"


@dataclass(frozen=True)
class Site:
    """One place where a delta can act.

    Attributes:
        path: the module's dotted path in the model; of a map kept as a bare parameter, the parameter's.
        in_features: width of its input (of an embedding: the vocabulary; of a convolution: its channels).
        out_features: width of its output.
        kind: ``linear``, ``embedding``, ``conv``, ``norm`` or ``experts`` (a stack of linear maps).
        role: the field's short name for it (``q k v o gate up down``), or None if nobody listed it.
        group: ``attention`` or ``mlp``, or None.
        layer: index of the layer it lies in, or None outside the layers.
        bias: whether it has a bias.
        kernel: of a convolution.
        parameter: name of the parameter, where the module keeps the map as a bare one.
        transposed: whether such a parameter has its input before its output axis.
        count: of experts.
        source: of a residual branch, path of the module that gets the branch's input; None for its own.
    """

    path: str
    in_features: int
    out_features: int
    kind: str = "linear"
    role: str | None = None
    group: str | None = None
    layer: int | None = None
    bias: bool = False
    kernel: tuple[int, ...] = ()
    parameter: str | None = None
    transposed: bool = False
    count: int = 0
    source: str | None = None

    @property
    def module(self) -> str:
        """Path of the module it belongs to: its own, or that of the one with the parameter."""
        return self.path if self.parameter is None else self.path.removesuffix("." + self.parameter)

    def answers_to(self, word: str) -> bool:
        """Whether a role, a group, a name (or the end of its path) or a ``/regular expression/`` picks it.

        Raises:
            TargetError: the expression is none.
        """
        if not is_expression(word):
            return word in (self.role, self.group) or ("." + self.path).endswith("." + word)
        try:
            return re.search(word[1:-1], self.path) is not None
        except re.error as error:
            raise TargetError(f"Target {word} is no regular expression: {error}.") from error


@dataclass(frozen=True)
class AttentionSite:
    """An attention layer, where keys and values can be added.

    Attributes:
        path: the attention module.
        heads: key-value heads.
        head_width: of each.
        layer: index of its layer.
        index: its place among all attention layers.
        part: ``encoder``, ``decoder`` or ``cross`` in an encoder-decoder, else None.
        source: path of a map that gets what the queries are made of.
        width: of that.
    """

    path: str
    heads: int
    head_width: int
    layer: int | None
    index: int
    part: str | None = None
    source: str = ""
    width: int = 0


def is_expression(word: str) -> bool:
    """Whether a target is a ``/regular expression/``."""
    return len(word) > 2 and word.startswith("/") and word.endswith("/")
