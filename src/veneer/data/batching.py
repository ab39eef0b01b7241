"""The order in which rows are seen: each once an epoch, decided by seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """A permutation of the rows that depends on nothing but ``seed`` and the epoch, so that a resumed run sees
    the very rows the interrupted one would have seen.

    Args:
        rows: how many.
        seed: of all epochs.
        lengths: if given, rows of like length come together, in random order otherwise: less padding.
        group: how many rows make an optimiser step; the longest come first in it, so memory peaks at once.
    """

    def __init__(self, rows: int, seed: int, lengths: Sequence[int] | None = None, group: int = 1) -> None:
        self.rows, self.seed, self.lengths, self.group = rows, seed, lengths, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))
