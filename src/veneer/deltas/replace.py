"""A module that runs on parameters of the adapter's own: a task's head, or any module trained in full.

    w  ←  v            for each named parameter of the module, swapped in for the call

The new parameters may have other shapes than the module's own (a head with another number of labels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from veneer.deltas.base import Delta


@dataclass(frozen=True, eq=False)
class Replace(Delta):
    """The module runs on ``values`` (by parameter name) in place of its own parameters."""

    values: Mapping[str, Tensor]

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The values, in the dtypes of the parameters whose place they take."""
        return {name: value.to(parameters[name].dtype) for name, value in self.values.items()}

    def merge_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values themselves."""
        return {name: value.detach().to(parameters[name].dtype).clone() for name, value in self.values.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return sum(value.nbytes for value in self.values.values())

    @property
    def flops_per_token(self) -> int:
        """None: the module does the work it would have done anyway."""
        return 0
