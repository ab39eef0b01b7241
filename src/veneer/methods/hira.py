"""HiRA: Hadamard high-rank adaptation (Huang et al. 2025, ICLR, §3).

    W ← W + W ⊙ (B A)

of high rank because W is. B is zero at the start: bit-equal to the base. Merges. Trained and stored: ``r (in + out)``
numbers a map.

Use it where LoRA learns too little at a given size; a step costs a product as large as the weight itself, and rows of
a batch can't share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, OfWeight
from veneer.errors import AdapterFileError
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.targeted import Targeted


class HiRA(Targeted):
    """The weight times a low-rank factor as its update."""

    name: ClassVar[str] = "hira"
    summary: ClassVar[str] = "multiplies weights by a low-rank factor; high rank at LoRA's size"
    paper: ClassVar[str] = "Huang et al. 2025, ICLR"
    learning_rate: ClassVar[float] = 2e-3
    peft_type: ClassVar[str] = "HIRA"
    peft_names: ClassVar[Mapping[str, str]] = {"r": "rank", "target_modules": "targets"}

    rank: int = Field(32, ge=1)
    """Rank r of the factor."""

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """A ``[r, in]`` Kaiming-uniform, B ``[out, r]`` zero."""
        bound = 1 / math.sqrt(site.in_features)
        a = torch.empty(self.rank, site.in_features).uniform_(-bound, bound, generator=generator)
        return {"hira_A": a, "hira_B": torch.zeros(site.out_features, self.rank)}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A function of the weight."""
        a, b = parameters["hira_A"], parameters["hira_B"]
        return OfWeight(lambda weight: weight + weight * (b @ a), held=a.nbytes + b.nbytes)

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With what is fixed here."""
        return super().to_peft(sites, site_map) | {"hira_dropout": 0.0, "fan_in_fan_out": False}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses per-module ranks."""
        if config.get("rank_pattern"):
            raise AdapterFileError("This HiRA adapter uses rank_pattern, which veneer does not read.")
        return super().from_peft(config)
