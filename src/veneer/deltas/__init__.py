"""The few forms in which every PEFT method changes a network. This floor knows tensors only."""

from veneer.deltas.base import Delta
from veneer.deltas.low_rank import LowRank
from veneer.deltas.replace import Replace

__all__ = ["Delta", "LowRank", "Replace"]
