"""What every form of delta can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor


class Delta(ABC):
    """A change at one site of a network, lowered from a method's parameters once a step.

    A delta acts in up to two places around the site's module ``y = f(x; w)``: it may let the module run on other
    parameters (`effective`), and it may change the result (`apply`). The default of each is to do nothing.
    """

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parameters to run the module on in place of its own, by name; those not named stay."""
        return {}

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """The module's new output, given its input ``x`` ``[..., in]`` and its own output ``y`` ``[..., out]``."""
        return y

    @abstractmethod
    def merge_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New values of the module's parameters with which it alone computes what the two do together.

        Computed in at least float32 and rounded once, to the parameter's own dtype. The given tensors stay as
        they are.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held by the tensors of this delta."""

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Floating-point operations `apply` adds for one token, a multiply-add counted as two."""
