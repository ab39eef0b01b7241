"""What every form of delta can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from torch import Tensor

from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.deltas.flow import Among


class Delta:
    """A change at one site of a network, lowered from a method's parameters once a step.

    A delta acts in up to three places around the site's module ``y = f(x; w)``, in this order; the default of each
    is to do nothing:

    - `before` changes the input the module gets,
    - `effective` lets the module run on other parameters,
    - `apply` changes the output, given also the input as it was before `before`.

    In training it may do all of it at once where the module is a plain linear map (`linears`).

    Weights are ``[out, in]`` here whatever way round the module stores them.
    """

    def before(self, x: Tensor) -> Tensor:
        """The input to hand to the module in place of ``x`` ``[..., in]``."""
        return x

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parameters to run the module on in place of its own, by name; those not named stay."""
        return {}

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """The module's new output, given its input ``x`` ``[..., in]`` and its own output ``y`` ``[..., out]``."""
        return y

    @classmethod
    def linears(
        cls, deltas: Sequence[Self], x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> Sequence[Tensor] | None:
        """What linear maps of one input and their deltas give, where their backwards are cheaper as one.

        Args:
            deltas: one for each map, all of this very class.
            x: ``[..., in]``.
            weights: ``[out, in]``, frozen, of the dtype of ``x``.
            biases: ``[out]``, frozen, or none.

        Returns:
            ``[..., out]`` of each; None: the modules run, and the deltas act around them.
        """
        return None

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New values of the module's parameters with which it alone computes what the two do together.

        Differentiable; only what changes, unrounded. A weight may have axes before its last two, one map each.

        Raises:
            AdapterError: this form cannot be expressed in the module's parameters.
        """
        raise AdapterError(f"{type(self).__name__} cannot be merged: no weights of the module alone do what it does.")

    def merge_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`changed`, computed in at least float32 and rounded once to the parameters' own dtypes; no gradient.

        Raises:
            AdapterError: this form cannot be expressed in the module's parameters.
        """
        import torch

        with torch.no_grad():
            wide = {
                name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in parameters.items()
            }
            return {name: value.to(parameters[name].dtype) for name, value in self.changed(wide).items()}

    @classmethod
    def mixed(cls, deltas: Sequence[Self], which: Tensor) -> Delta | None:
        """One delta for a batch whose row i is under ``deltas[which[i]]``; None if this form is run group by group.

        Args:
            deltas: of this form, all at the same site.
            which: ``[rows]``, int64.
        """
        return None

    def for_rows(self, among: Among) -> Delta:
        """The delta as it acts on some rows of a batch, where it knows more of the batch than it is handed."""
        return self

    def changes(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether it does anything at all to a module with these parameters; True where that cannot be told."""
        import torch

        wide = {name: value.float() if value.is_floating_point() else value for name, value in parameters.items()}
        try:
            merged = self.merge_into(wide)
        except AdapterError:
            return True
        return any(not torch.equal(value, wide[name]) for name, value in merged.items())

    @property
    def swaps(self) -> bool:
        """Whether the module has to run on other parameters than its own."""
        return type(self).effective is not Delta.effective

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors of this delta."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations it adds for one token, a multiply-add counted as two."""
        return 0


def per_row(values: Sequence[Tensor], which: Tensor, ndim: int) -> Tensor:
    """Vectors ``[n]`` of several deltas as ``[rows, 1, …, n]``, to be broadcast over an output of ``ndim`` axes."""
    import torch

    rows = torch.stack(list(values))[which]
    return rows.view(len(which), *[1] * (ndim - 2), rows.shape[-1])
