"""Deltas made of deltas.

Stack     δ_n(… δ_1(f)): around the module f each acts on what the ones before it left
Fusion    y ← y + Σ_n softmax_n(q·k_n) v_n,  q = W_q y + b_q, k_n = W_k z_n + b_k, v_n = W_v z_n, z_n = δ_n(x, y) − y
          (AdapterFusion, Pfeiffer et al. 2021, §3; what the adapters add is fused, as in the authors' code)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.deltas.base import Delta
from veneer.deltas.flow import Among


@dataclass(frozen=True, eq=False)
class Stack(Delta):
    """Several deltas of one adapter at one site: each acts around the module together with all before it.

    Those that let the module run on other parameters come first, as nothing else can be inside the module.
    """

    deltas: Sequence[Delta]

    def before(self, x: Tensor) -> Tensor:
        """All, the outermost first."""
        for delta in reversed(self._inside_out):
            x = delta.before(x)
        return x

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each on what the ones before it made."""
        new: dict[str, Tensor] = {}
        for delta in self._inside_out:
            new |= delta.effective({**parameters, **new})
        return new

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """All, the innermost first, each with the input that those around it leave."""
        inputs = [x]
        for delta in reversed(self._inside_out[1:]):
            inputs.append(delta.before(inputs[-1]))
        for delta, own in zip(self._inside_out, reversed(inputs), strict=True):
            y = delta.apply(own, y)
        return y

    @classmethod
    def linears(
        cls, deltas: Sequence[Self], x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> Sequence[Tensor] | None:
        """As the innermost of each, then the others, if these act on outputs only."""
        inner = [delta._inside_out[0] for delta in deltas]
        outer = [delta._inside_out[1:] for delta in deltas]
        kind, *kinds = (type(each) for each in inner)
        if any(each is not kind for each in kinds) or not all(_acts_after(each) for rest in outer for each in rest):
            return None
        outputs = kind.linears(inner, x, weights, biases)
        if outputs is None:
            return None
        pairs = zip(outputs, outer, strict=True)
        return [functools.reduce(lambda y, each: each.apply(x, y), rest, y) for y, rest in pairs]

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All, the innermost first."""
        new: dict[str, Tensor] = {}
        for delta in self._inside_out:
            new |= delta.changed({**parameters, **new})
        return new

    @property
    def flat(self) -> Sequence[Delta]:
        """The deltas, with those of stacks among them in their place."""
        return [each for delta in self.deltas for each in (delta.flat if isinstance(delta, Stack) else [delta])]

    @functools.cached_property
    def _inside_out(self) -> Sequence[Delta]:
        return sorted(self.flat, key=lambda delta: not delta.swaps)

    def for_rows(self, among: Among) -> Delta:
        """Each for these."""
        return Stack([delta.for_rows(among) for delta in self.deltas])

    def changes(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether any does."""
        return any(delta.changes(parameters) for delta in self.deltas)

    @property
    def swaps(self) -> bool:
        """Whether any does."""
        return any(delta.swaps for delta in self.deltas)

    @property
    def nbytes(self) -> int:
        """Of all."""
        return sum(delta.nbytes for delta in self.deltas)

    @property
    def flops_per_token(self) -> int:
        """Of all."""
        return sum(delta.flops_per_token for delta in self.deltas)


def _acts_after(delta: Delta) -> bool:
    """Whether it only changes outputs."""
    return type(delta).before is Delta.before and not delta.swaps


@dataclass(frozen=True, eq=False)
class Fusion(Delta):
    """Attention over the outputs of several deltas.

    Args:
        deltas: the N deltas.
        query: ``[d, d]``; with ``query_bias`` ``[d]``.
        key: ``[d, d]``; with ``key_bias`` ``[d]``.
        value: ``[d, d]``.
    """

    deltas: Sequence[Delta]
    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """The fused output, in place of y."""
        z = torch.stack([delta.apply(x, y) - y for delta in self.deltas], -2)
        q = F.linear(y, self.query.to(y.dtype), self.query_bias.to(y.dtype))
        k = F.linear(z, self.key.to(y.dtype), self.key_bias.to(y.dtype))
        v = F.linear(z, self.value.to(y.dtype))
        weights = (q.unsqueeze(-2) * k).sum(-1).softmax(-1)
        return y + (weights.unsqueeze(-1) * v).sum(-2)

    def for_rows(self, among: Among) -> Delta:
        """Each delta's rows."""
        return replace(self, deltas=[delta.for_rows(among) for delta in self.deltas])

    @property
    def nbytes(self) -> int:
        """Of the projections and all deltas."""
        return super().nbytes + sum(delta.nbytes for delta in self.deltas)

    @property
    def flops_per_token(self) -> int:
        """One query, N keys and values, and all deltas."""
        n, d = len(self.deltas), len(self.query)
        return 2 * d * d * (1 + 2 * n) + sum(delta.flops_per_token for delta in self.deltas)
