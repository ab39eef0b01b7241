"""Frozen linear maps and their deltas as one computation, those that get the same input together.

Queries, keys and values of a layer share an input, and so do gate and value of a gated feed-forward layer. The first
of them that is called computes all; the others find theirs, if it was from that very input, under that plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.plan import Plan

Given = tuple[Tensor, int, Plan]
"""An input, its version, and the plan in force."""


@dataclass(eq=False)
class Siblings:
    """Linear maps that get the same input, by their paths."""

    modules: dict[str, nn.Linear] = field(default_factory=dict)
    _given: Given | None = None
    _outputs: dict[str, Tensor] = field(default_factory=dict)

    def output(self, path: str, x: Tensor, plan: Plan) -> Tensor | None:
        """Of a map and its delta; None where these are no one computation."""
        given = x, -1 if x.is_inference() else x._version, plan
        if not self._is(given) and path in self._outputs:  # no siblings this time
            del self._outputs[path]
            return self._computed(path, given, {path: self.modules[path]}).get(path)
        if path not in self._outputs:
            self._given, self._outputs = given, self._computed(path, given, self.modules)
        output = self._outputs.pop(path, None)
        if not self._outputs:
            self._given = None  # with checkpointing nobody else keeps it
        return output

    def forget(self) -> None:
        """Outputs nobody came for."""
        self._given, self._outputs = None, {}

    def _is(self, given: Given) -> bool:
        known = self._given
        return known is not None and known[0] is given[0] and known[1] == given[1] and known[2] is given[2]

    def _computed(self, path: str, given: Given, modules: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        x, _, plan = given
        delta = plan.modules.get(path)
        if delta is None or not is_frozen(modules[path], x):
            return {}
        kind = type(delta)
        modules = {
            at: module
            for at, module in modules.items()
            if type(plan.modules.get(at)) is kind and is_frozen(module, x) and module.in_features == x.shape[-1]
        }
        weights, biases = zip(*((module.weight, module.bias) for module in modules.values()), strict=True)
        outputs = kind.linears([plan.modules[at] for at in modules], x, weights, biases)
        return {} if outputs is None else dict(zip(modules, outputs, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules, "_given": None, "_outputs": {}}


def is_frozen(module: nn.Linear, x: Tensor) -> bool:
    """Whether a map needs no gradients and computes in the dtype of its input."""
    own = [each for each in (module.weight, module.bias) if each is not None]
    alike = x.dtype == module.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    return alike and not any(each.requires_grad for each in own)
