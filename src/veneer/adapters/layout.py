"""Where tokens come to stand in rows that virtual tokens are put into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.deltas import Tokens
from veneer.errors import AdapterError


def longest(rows: Sequence[Tokens | None]) -> int:
    """By how much the row that grows most grows."""
    return max(row.growth for row in rows if row is not None)


@dataclass(frozen=True)
class Layout:
    """Where what was in the rows comes to stand, n tokens in each before and m after.

    Attributes:
        places: ``[rows, n]``, of each token in its row; of a marker, where the last of its virtual tokens stands.
        source: ``[rows, m]``, the token that stands there, or that virtual tokens stand before or instead of.
        slots: ``[rows, m]``, where virtual tokens stand.
        within: ``[rows, m]``, what belongs to the row; the rest is padding that makes rows equally long.
    """

    places: Tensor
    source: Tensor
    slots: Tensor
    within: Tensor

    @classmethod
    def of(cls, mask: Tensor, rows: Sequence[Tokens | None], ids: Tensor | None = None, *, left: bool) -> Layout:
        """Of rows with this mask.

        Args:
            mask: ``[rows, n]``, zero at padding.
            rows: each row's virtual tokens.
            ids: ``[rows, n]``, to find markers in. Without them all virtual tokens stand before the first real one,
                which is the same to a mask: markers are among the real tokens.
            left: whether padding that makes rows equally long goes to their left.

        Raises:
            AdapterError: a row has fewer markers than slots.
        """
        taken, stays = torch.ones_like(mask, dtype=torch.long), torch.ones_like(mask, dtype=torch.bool)
        first = mask.long().argmax(-1).tolist()  # of the real tokens, in each row
        for index, row in enumerate(rows):
            if row is not None and ids is not None and row.slots:
                found = _markers(index, ids[index], mask[index], row)
                taken[index, found] = torch.tensor(row.slots, device=mask.device)
                stays[index, found] = False
            if row is not None:
                taken[index, first[index]] += row.growth if ids is None else row.leading
        lengths = taken.sum(-1, keepdim=True)
        width = mask.shape[1] + longest(rows)
        start = width - lengths if left else torch.zeros_like(lengths)
        ends = taken.cumsum(-1) + start
        there = torch.arange(width, device=mask.device).expand(len(mask), -1).contiguous()
        source = torch.searchsorted(ends, there, right=True).clamp(max=mask.shape[1] - 1)
        places, within = ends - 1, (there >= start) & (there < start + lengths)
        kept = (places.gather(1, source) == there) & stays.gather(1, source)
        return cls(places, source, within & ~kept, within)

    def placed(self, values: Tensor, fill: Any, pad: Any) -> Tensor:
        """Values ``[rows, n]`` in their places: ``[rows, m]``.

        Args:
            values: of the tokens.
            fill: that of virtual tokens; None for that of the token they stand before or instead of.
            pad: that of padding.
        """
        moved = values.gather(1, self.source)
        if fill is not None:
            moved = torch.where(self.slots, fill, moved)
        return torch.where(self.within, moved, pad).to(values.dtype)


def _markers(index: int, ids: Tensor, mask: Tensor, row: Tokens) -> Tensor:
    """Where in a row its slots are."""
    real = mask.bool()
    found = ((ids == row.marker) & real).nonzero()[:, 0][: len(row.slots)]
    if len(found) < len(row.slots):
        raise AdapterError(
            f"Row {index} of the batch has {len(found)} of the {len(row.slots)} markers (token {int(row.marker)}) that "  # type: ignore[arg-type]
            "the adapter's virtual tokens stand at; put them into its text, as it was trained."
        )
    if not real[int(real.long().argmax()) :][: int(real.sum())].all():
        raise AdapterError(
            f"Row {index} of the batch has gaps in its attention_mask, and virtual tokens at slots need none."
        )
    return found
