"""The few forms in which every PEFT method changes a network. This floor knows tensors only."""

from veneer.deltas.attention import KeyValues, Tokens
from veneer.deltas.base import Delta
from veneer.deltas.bottleneck import Bottleneck
from veneer.deltas.composed import Fusion, Stack
from veneer.deltas.flow import Among, Beside, Flow
from veneer.deltas.gates import MeanGate, Opening
from veneer.deltas.kron import Kron
from veneer.deltas.low_rank import ConvLowRank, EmbeddingLowRank, LowRank, ScaledLowRank
from veneer.deltas.of_weight import AtParameter, OfWeight, Param, Replace, Sparse
from veneer.deltas.rotate import Rotate
from veneer.deltas.rows import Rows
from veneer.deltas.scale import Bias, InputScale, Scale

__all__ = [
    "Among", "AtParameter", "Beside", "Bias", "Bottleneck", "ConvLowRank", "Delta", "EmbeddingLowRank", "Flow",
    "Fusion", "InputScale", "KeyValues", "Kron", "LowRank", "MeanGate", "OfWeight", "Opening", "Param",
    "Replace", "Rotate", "Rows", "Scale", "ScaledLowRank", "Sparse", "Stack", "Tokens",
]  # fmt: skip
