"""A model run on other parameters throughout: swapped in for a forward, at every place that reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.deltas import Delta

Out = list[tuple[nn.Module, str, nn.Parameter | None]]
"""Parameters that others stand in for: module, name there, parameter."""


class Whole:
    """The parameters of a model, by where they are; tied ones by their first path.

    Args:
        model: the model.
        own: its own parameters by path, adapters' apart.
    """

    def __init__(self, model: nn.Module, own: Mapping[str, Tensor]) -> None:
        self.own = dict(own)
        names = {id(parameter): name for name, parameter in own.items()}
        self._places = [
            (module, leaf, names[id(parameter)])
            for module in model.modules()
            for leaf, parameter in module._parameters.items()
            if id(parameter) in names
        ]
        self._rounded: dict[str, tuple[Tensor, int, Tensor]] = {}

    def swap_in(self, delta: Delta) -> Out:
        """Put what the delta makes of the parameters in their places; what was there is to be handed to `swap_out`."""
        values = {name: self._as_own(name, value) for name, value in delta.changed(self.own).items()}
        out: Out = []
        for module, leaf, name in self._places:
            if name in values:
                out.append((module, leaf, module._parameters[leaf]))
                module._parameters[leaf] = values[name]  # type: ignore[assignment]
        return out

    @staticmethod
    def swap_out(out: Out) -> None:
        """Put back what was there."""
        for module, leaf, parameter in out:
            module._parameters[leaf] = parameter
        out.clear()

    def _as_own(self, name: str, value: Tensor) -> Tensor:
        """Rounded to the dtype of the model's own; without gradients once, not for every token that is generated."""
        dtype = self.own[name].dtype
        if value.dtype == dtype:
            return value
        if torch.is_grad_enabled():
            self._rounded.pop(name, None)
            return value.to(dtype)
        source, version, rounded = self._rounded.get(name, (None, 0, None))
        if source is not value or version != value._version or rounded is None:
            rounded = value.to(dtype)
            self._rounded[name] = value, value._version, rounded
        return rounded
