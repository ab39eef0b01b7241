"""A bottleneck: a small two-layer network beside a branch of the base.

    sequential   y ← y + s · (act(y W_dᵀ + b_d) W_uᵀ + b_u)      Houlsby et al. 2019, §2.1
    parallel     y ← y + s · (act(x W_dᵀ + b_d) W_uᵀ + b_u)      He et al. 2022, §4.4

where y is the branch's output before its residual is added, and x its input. Not mergeable: it is not linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.deltas.base import Delta


@dataclass(frozen=True, eq=False)
class Bottleneck(Delta):
    """``y += scale · up(act(down(h)))`` with h = x if ``parallel``, else y.

    Args:
        down: ``[m, width]``.
        down_bias: ``[m]``.
        up: ``[out, m]``.
        up_bias: ``[out]``.
        act: the nonlinearity.
        scale: the factor s.
        parallel: whether it reads the branch's input instead of its output.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    act: Callable[[Tensor], Tensor]
    scale: float = 1.0
    parallel: bool = False

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the bottleneck's output."""
        h = x if self.parallel else y
        inner = self.act(F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)))
        return y + F.linear(inner, self.up.to(y.dtype), self.up_bias.to(y.dtype)) * self.scale

    def changes(self, parameters: Mapping[str, Tensor]) -> bool:
        """Unless nothing comes up."""
        return bool(self.up.any() or self.up_bias.any())

    @classmethod
    def mixed(cls, deltas: Sequence[Self], which: Tensor) -> Delta | None:
        """Batched products; widths padded with zeros, masked by a zero up-projection."""
        first = deltas[0]
        if any((d.act, d.parallel) != (first.act, first.parallel) for d in deltas):
            return None
        width = max(len(delta.down) for delta in deltas)

        def padded(of: str, axis: int) -> Tensor:
            values = [getattr(delta, of) for delta in deltas]
            missing = [[0, 0] * (v.dim() - 1 - axis) + [0, width - v.shape[axis]] for v in values]
            return torch.stack([F.pad(v, m) for v, m in zip(values, missing, strict=True)])[which]

        scale = torch.tensor([delta.scale for delta in deltas], device=which.device, dtype=torch.float64)[which]
        up_bias = torch.stack([delta.up_bias for delta in deltas])[which]
        return _BottleneckRows(
            padded("down", 0), padded("down_bias", 0), padded("up", 1), up_bias, first.act, scale, first.parallel
        )

    @property
    def flops_per_token(self) -> int:
        """``2 m (width + out)``."""
        return 2 * (self.down.numel() + self.up.numel())


@dataclass(frozen=True, eq=False)
class _BottleneckRows(Delta):
    """`Bottleneck` with everything ``[rows, …]``."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    act: Callable[[Tensor], Tensor]
    scale: Tensor
    parallel: bool

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        h = x if self.parallel else y
        flat = h.reshape(len(h), -1, h.shape[-1])
        inner = self.act(torch.baddbmm(self.down_bias[:, None].to(h.dtype), flat, self.down.mT.to(h.dtype)))
        out = torch.baddbmm(self.up_bias[:, None].to(h.dtype), inner, self.up.mT.to(h.dtype))
        return y + (out * self.scale[:, None, None].to(h.dtype)).view_as(y)
