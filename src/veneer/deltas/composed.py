"""Deltas made of deltas.

Stack     one after the other, in the stated order: the second acts on what the first left
Gate      y ← y + g ⊙ (δ(x, y) − y)                      g scales what the delta changes (UniPELT, Mao et al. 2022)
Fusion    y ← Σ_n softmax_n(q·k_n) v_n,  q = W_q y + b_q, k_n = W_k z_n + b_k, v_n = W_v z_n, z_n = δ_n(x, y)
          (AdapterFusion, Pfeiffer et al. 2021, §3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.deltas.base import Delta
from veneer.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Stack(Delta):
    """Several deltas of one adapter at one site, in this order."""

    deltas: Sequence[Delta]

    def before(self, x: Tensor) -> Tensor:
        """All, in order."""
        for delta in self.deltas:
            x = delta.before(x)
        return x

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each on what the ones before it made."""
        new: dict[str, Tensor] = {}
        for delta in self.deltas:
            new |= delta.effective({**parameters, **new})
        return new

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """All, in order."""
        for delta in self.deltas:
            y = delta.apply(x, y)
        return y

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All, in order."""
        new: dict[str, Tensor] = {}
        for delta in self.deltas:
            new |= delta.changed({**parameters, **new})
        return new

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


@dataclass(frozen=True, eq=False)
class Gate(Delta):
    """Scale what ``delta`` does to the output by ``g`` (any shape that broadcasts to it).

    Raises:
        AdapterError: the delta acts before the module or through its parameters, where there is no output to gate.
    """

    delta: Delta
    g: Tensor

    def __post_init__(self) -> None:
        if self.delta.swaps or type(self.delta).before is not Delta.before:
            raise AdapterError(f"Only what acts on an output can be gated, and {type(self.delta).__name__} does not.")

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """The gated change."""
        return y + self.g.to(y.dtype) * (self.delta.apply(x, y) - y)

    @property
    def nbytes(self) -> int:
        """Of the delta and the gate."""
        return self.delta.nbytes + self.g.nbytes

    @property
    def flops_per_token(self) -> int:
        """Of the delta."""
        return self.delta.flops_per_token


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
        z = torch.stack([delta.apply(x, y) for delta in self.deltas], -2)
        q = F.linear(y, self.query.to(y.dtype), self.query_bias.to(y.dtype))
        k = F.linear(z, self.key.to(y.dtype), self.key_bias.to(y.dtype))
        v = F.linear(z, self.value.to(y.dtype))
        weights = (q.unsqueeze(-2) * k).sum(-1).softmax(-1)
        return (weights.unsqueeze(-1) * v).sum(-2)

    @property
    def nbytes(self) -> int:
        """Of the projections and all deltas."""
        return super().nbytes + sum(delta.nbytes for delta in self.deltas)

    @property
    def flops_per_token(self) -> int:
        """One query, N keys and values, and all deltas."""
        n, d = len(self.deltas), len(self.query)
        return 2 * d * d * (1 + 2 * n) + sum(delta.flops_per_token for delta in self.deltas)
