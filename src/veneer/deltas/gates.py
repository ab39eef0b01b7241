"""Gates that open by what a row says: the mean of a learned opening over its tokens (UniPELT, Mao et al. 2022, §3.2).

g = mean_t σ(w · x_t + b)            over the real tokens of a row, or, where attention is causal, over those so far:
g_t = Σ_{s ≤ t} σ(w · x_s + b) / t   so that what is generated step by step is what one forward computes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.deltas.base import Delta
from veneer.deltas.flow import Among, Flow


@dataclass(frozen=True, eq=False)
class Opening:
    """How far a gate is open, by the input of a module.

    Args:
        weight: ``[d]``.
        bias: ``[]``.
        flow: of the forward.
        key: what the openings of earlier steps are kept under.
        causal: whether later tokens are out of sight.
        decoder: whether the module sees a decoder's tokens, beside an encoder's.
        axis: of the rows in the module's input; positions are along the other of the first two.
        among: the rows it is for; None for all.
    """

    weight: Tensor
    bias: Tensor
    flow: Flow
    key: object
    causal: bool
    decoder: bool
    axis: int = 0
    among: Among | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` ``[rows, positions, d]`` (rows along ``axis``) → ``[rows, positions or 1]``."""
        flat = x.dim() == 2
        if flat:
            x = x.view(len(self.among.rows) if self.among else self.flow.rows or 1, -1, x.shape[-1])
        rows_first = x if flat or self.axis == 0 else x.transpose(0, 1)
        opened = F.linear(rows_first, self.weight[None].to(x.dtype), self.bias.to(x.dtype).view(1)).sigmoid()[..., 0]
        real = self._real(opened)
        opened = opened * real
        if not self.causal:
            return opened.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        so_far, there = opened.cumsum(1), real.cumsum(1)
        before, counted = self._before(opened, real)
        return (so_far + before) / (there + counted).clamp(min=1)

    def for_rows(self, among: Among) -> Opening:
        """For these; they come first in what a part of a batch gets."""
        return replace(self, among=among, axis=self.axis if among.axis is None else 0)

    def _real(self, opened: Tensor) -> Tensor:
        """Which of the positions count, ``[rows, positions]``."""
        mask = self.flow.decoder_mask if self.decoder else self.flow.mask
        if mask is None:
            return torch.ones_like(opened)
        mask = mask[:, -opened.shape[1] :].to(opened.dtype)
        return mask if self.among is None else mask[list(self.among.rows)]

    def _before(self, opened: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of earlier steps, ``[rows, 1]`` each; keeps those of this one."""
        if self.flow.memory is None:
            return opened.new_zeros(1), opened.new_zeros(1)
        if self.among is None:
            before = self.flow.memory.extend(self.key, opened, real)
            return before[0].to(opened.dtype), before[1].to(opened.dtype)
        rows, shape = list(self.among.rows), (self.among.count, opened.shape[1])
        whole = [each.new_zeros(shape).index_copy(0, torch.tensor(rows), each.detach()) for each in (opened, real)]
        before = self.flow.memory.extend(self.key, *whole)
        return before[0][rows].to(opened.dtype), before[1][rows].to(opened.dtype)


@dataclass(frozen=True, eq=False)
class MeanGate(Delta):
    """``y ← y + g ⊙ (δ(x, y) − y)`` with g an `Opening` of the module's input, or of its output.

    Args:
        delta: which acts on the output only.
        opening: how far it is let through.
        of_output: whether the opening is told by y, where the delta reads that, too.
    """

    delta: Delta
    opening: Opening
    of_output: bool = False

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """The gated change."""
        open = self.opening(y if self.of_output else x)[..., None]
        change = self.delta.apply(x, y) - y
        if y.dim() == 2:
            return y + (change.view(len(open), -1, y.shape[-1]) * open).view_as(y)
        return y + change * (open if self.opening.axis == 0 else open.transpose(0, 1))

    def for_rows(self, among: Among) -> Delta:
        """The delta and the mask of these rows."""
        return replace(self, delta=self.delta.for_rows(among), opening=self.opening.for_rows(among))

    def changes(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the delta does."""
        return self.delta.changes(parameters)

    @property
    def nbytes(self) -> int:
        """Of the delta and the gate."""
        return self.delta.nbytes + self.opening.weight.nbytes + self.opening.bias.nbytes

    @property
    def flops_per_token(self) -> int:
        """Of the delta and the gate."""
        return self.delta.flops_per_token + 2 * self.opening.weight.numel()
