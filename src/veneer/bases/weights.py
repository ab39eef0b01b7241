"""Weights the right way round: deltas know ``[out, in]``; GPT-2's ``Conv1D`` stores ``[in, out]``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters by name, the weight as ``[out, in]``."""
    found = {name: value for name, value in module._parameters.items() if value is not None}
    return stored(module, found)


def stored(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters the way round the module stores them (its own inverse)."""
    if is_transposed(module) and "weight" in values:
        return {**values, "weight": values["weight"].mT}
    return dict(values)
