"""Deltas that add to what attention sees.

    KeyValues   K ← [P_k; K],  V ← [P_v; V]     in one attention layer (prefix tuning, Li & Liang 2021, §4)
    Tokens      X ← [E; X]                      virtual tokens before the input (prompt tuning, Lester et al. 2021, §2)

Attending to a prefix is a mixture of two attentions (He et al. 2022, eq. 7):

    attn(Q, [P_k; K], [P_v; V]) = (1 − λ) attn(Q, K, V) + λ attn(Q, P_k, P_v)

Neither merges: no weight of the base computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.deltas.base import Delta


@dataclass(frozen=True, eq=False)
class KeyValues(Delta):
    """Keys and values ``[P, key-value heads, head width]`` that every query of the layer sees."""

    key: Tensor
    value: Tensor

    def __len__(self) -> int:
        return len(self.key)

    def __add__(self, other: KeyValues) -> KeyValues:
        return KeyValues(torch.cat([self.key, other.key]), torch.cat([self.value, other.value]))

    @property
    def flops_per_token(self) -> int:
        """Scores and sums over P more keys (as for as many query heads as key-value heads)."""
        return 4 * self.key.numel()


@dataclass(frozen=True, eq=False)
class Tokens(Delta):
    """Embeddings ``[l, width]`` of virtual tokens before the input."""

    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.embeddings)

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(torch.cat([self.embeddings, other.embeddings]))


def padded(prefixes: Sequence[KeyValues | None], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Prefixes of a batch's rows as one tensor, right-aligned next to the real keys.

    Returns:
        Keys and values ``[rows, heads, P, head width]`` and which of them are there, ``[rows, P]``.
    """
    longest = max(len(prefix) for prefix in prefixes if prefix is not None)
    model = next(prefix for prefix in prefixes if prefix is not None)
    empty = model.key.new_zeros(longest, *model.key.shape[1:])
    keys, values, there = [], [], []
    for prefix in prefixes:
        gap = longest - (len(prefix) if prefix is not None else 0)
        keys.append(empty if prefix is None else torch.cat([empty[:gap], prefix.key]))
        values.append(empty if prefix is None else torch.cat([empty[:gap], prefix.value]))
        there.append(torch.arange(longest, device=empty.device) >= gap)
    stacked = [torch.stack(each).to(dtype).transpose(1, 2) for each in (keys, values)]
    return stacked[0], stacked[1], torch.stack(there)
