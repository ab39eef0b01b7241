"""Deltas that add to what attention sees.

    KeyValues   K ← [P_k; K],  V ← [P_v; V]     in one attention layer (prefix tuning, Li & Liang 2021, §4)
    Tokens      X ← [E; X]                      virtual tokens before the input (prompt tuning, Lester et al. 2021, §2)
                X ← [E_0; X_1; E_1; X_2; E_2]   or at slots in it (P-tuning, Liu et al. 2021, §2)

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
from veneer.deltas.flow import Among
from veneer.deltas.gates import Opening
from veneer.errors import AdapterError


@dataclass(frozen=True, eq=False)
class KeyValues(Delta):
    """Keys and values ``[P, key-value heads, head width]`` that every query of the layer sees.

    Args:
        key: the keys.
        value: the values.
        opening: a gate that both are multiplied by, for each query; it asks for what the module ``source`` gets.
        source: path of that module.
    """

    key: Tensor
    value: Tensor
    opening: Opening | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.opening is not None:
            self.opening.flow.wanted.add(self.source)

    def gate(self, rows: Sequence[int]) -> Tensor | None:
        """How far each query of these rows sees it, ``[rows, queries or 1]``; None for fully."""
        if self.opening is None:
            return None
        flow = self.opening.flow
        among = Among(rows, flow.rows or len(rows), self.opening.axis)
        return self.opening.for_rows(among)(among.of(flow.inputs[self.source]))

    def __len__(self) -> int:
        return len(self.key)

    def __add__(self, other: KeyValues) -> KeyValues:
        if self.opening is not None or other.opening is not None:
            raise AdapterError("A gated prefix can't be joined with another in one adapter.")
        return KeyValues(torch.cat([self.key, other.key]), torch.cat([self.value, other.value]))

    @property
    def flops_per_token(self) -> int:
        """Scores and sums over P more keys (as for as many query heads as key-value heads)."""
        return 4 * self.key.numel()


@dataclass(frozen=True, eq=False)
class Tokens(Delta):
    """Embeddings ``[l, width]`` of virtual tokens, in the order they stand in: before the input, and at its slots.

    Attributes:
        embeddings: all of them.
        slots: how many stand in the place of each marker; the others stand before the input.
        marker: the token id ``[]``, int64, that marks slots: its first occurrences in a row, one a slot, are replaced.
    """

    embeddings: Tensor
    slots: tuple[int, ...] = ()
    marker: Tensor | None = None

    @property
    def growth(self) -> int:
        """How much longer a row becomes."""
        return len(self.embeddings) - len(self.slots)

    @property
    def leading(self) -> int:
        """How many stand before the input."""
        return len(self.embeddings) - sum(self.slots)

    def __add__(self, other: Tokens) -> Tokens:
        if self.marker is not None and other.marker is not None:
            raise AdapterError("Only one method of an adapter can put virtual tokens at slots in the input.")
        both = (self, other)
        parts = [one.embeddings[: one.leading] for one in both] + [one.embeddings[one.leading :] for one in both]
        marker = self.marker if self.marker is not None else other.marker
        return Tokens(torch.cat(parts), (*self.slots, *other.slots), marker)


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
