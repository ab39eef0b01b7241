"""Frozen linear maps and their deltas as one computation, those that get the same input together.

Queries, keys and values of a layer share an input, and so do gate and value of a gated feed-forward layer. The first
of them that is called computes all; the others find theirs, if it was from that very input, under that plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from veneer.adapters.plan import Plan

Given = tuple[Tensor, int, Plan]
"""An input, its version, and the plan in force."""


@dataclass(frozen=True, eq=False)
class Map:
    """A linear map.

    Attributes:
        module: it.
        forward: what stands in the place of its own in training.
    """

    module: nn.Linear
    forward: Callable[..., Any]

    def takes(self, x: Tensor) -> bool:
        """Whether it would compute just this, were it called with ``x`` now; without gradients of its own."""
        module = self.module
        weight, bias = module._parameters.get("weight"), module.bias  # a weight that hooks set is set at its call
        if weight is None or module.__dict__.get("forward") is not self.forward:
            return False
        alike = x.dtype == weight.dtype and x.shape[-1] == module.in_features
        return alike and not weight.requires_grad and not (bias is not None and bias.requires_grad)


@dataclass(eq=False)
class Siblings:
    """Linear maps that get the same input, by their paths."""

    maps: dict[str, Map] = field(default_factory=dict)
    _given: Given | None = None
    _outputs: dict[str, Tensor] = field(default_factory=dict)

    def output(self, path: str, x: Tensor, plan: Plan) -> Tensor | None:
        """Of a map and its delta; None where these are no one computation."""
        given = x, -1 if x.is_inference() else x._version, plan
        if path not in self._outputs:
            self._given, self._outputs = given, self._computed(path, given, self.maps)
        known = self._given
        output = self._outputs.pop(path, None)
        if not self._outputs:
            self._given = None  # with checkpointing nobody else keeps it
        if known is not None and known[0] is x and known[1] == given[1] and known[2] is plan:
            return output
        return self._computed(path, given, {path: self.maps[path]}).get(path)  # no siblings this time

    def forget(self) -> None:
        """Outputs nobody came for."""
        self._given, self._outputs = None, {}

    def _computed(self, path: str, given: Given, maps: Mapping[str, Map]) -> dict[str, Tensor]:
        x, _, plan = given
        kind = type(plan.modules.get(path))
        maps = {
            at: each
            for at, each in sorted(maps.items())  # whatever was attached first
            if at in plan.modules and type(plan.modules[at]) is kind and each.takes(x)
        }
        if path not in maps:
            return {}
        weights, biases = zip(*((each.module.weight, each.module.bias) for each in maps.values()), strict=True)
        outputs = plan.modules[path].linears([plan.modules[at] for at in maps], x, weights, biases)
        return {} if outputs is None else dict(zip(maps, outputs, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {"maps": self.maps, "_given": None, "_outputs": {}}
