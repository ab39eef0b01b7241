"""LoHa: low-rank Hadamard products (Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098, §2.2; Yeh et al. 2023, LyCORIS).

    W ← W + s · (B₁A₁) ⊙ (B₂A₂),     s = α / r

of rank up to r²: it is LoRA of rank r² whose factors are the row- and column-wise products of these (Khatri–Rao), and
runs, mixes and exports as that. A₂ is zero at the start: bit-equal to the base. Merges. Trained and stored:
``2 r (in + out)`` numbers a map.

Use it where a small adapter needs a high rank; a step costs what LoRA of rank r² costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, LowRank
from veneer.errors import AdapterFileError
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.targeted import Targeted


class LoHa(Targeted):
    """An elementwise product of two low-rank updates."""

    name: ClassVar[str] = "loha"
    summary: ClassVar[str] = "elementwise product of two low-rank updates; high rank from few numbers"
    paper: ClassVar[str] = "Hyeon-Woo et al. 2022, arXiv:2108.06098"
    learning_rate: ClassVar[float] = 2e-3
    peft_type: ClassVar[str] = "LOHA"
    peft_names: ClassVar[Mapping[str, str]] = {"r": "rank", "alpha": "alpha", "target_modules": "targets"}

    rank: int = Field(8, ge=1)
    """Rank r of each of the two."""
    alpha: float = Field(8.0, gt=0)
    """The update is scaled by alpha / rank."""

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """B ``[out, r]`` and A ``[r, in]`` Kaiming-uniform, but for A₂, which is zero."""

        def kaiming(*shape: int) -> Tensor:
            bound = 1 / math.sqrt(shape[1])
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        return {
            "hada_w1_a": kaiming(site.out_features, self.rank),
            "hada_w1_b": kaiming(self.rank, site.in_features),
            "hada_w2_a": kaiming(site.out_features, self.rank),
            "hada_w2_b": torch.zeros(self.rank, site.in_features),
        }

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A low-rank delta of rank r²."""
        b1, a1, b2, a2 = (parameters[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        a = (a1[:, None] * a2[None]).flatten(0, 1)
        b = (b1[:, :, None] * b2[:, None]).flatten(1)
        return LowRank(a, b, self.alpha / self.rank)

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With what is fixed here."""
        return super().to_peft(sites, site_map) | {"rank_dropout": 0.0, "module_dropout": 0.0}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses per-module ranks."""
        if odd := [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]:
            raise AdapterFileError(f"This LoHa adapter uses {', '.join(odd)}, which veneer does not read.")
        return super().from_peft(config)
