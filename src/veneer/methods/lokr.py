"""LoKr: low-rank Kronecker products (Yeh et al. 2023, LyCORIS, arXiv:2309.14859, §3).

    W ← W + s · C ⊗ M,     s = α / r,    M = B A of rank r where that is smaller, else in full

with the sizes of C and M the factors of ``out`` and ``in`` nearest to their square roots. C is zero at the start: the
adapted model is bit-equal to the base. Merges. Trained: a few hundred numbers a map.

Use it for very small adapters of high rank: C ⊗ M has the rank of C times that of M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, Kron
from veneer.errors import AdapterFileError
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.targeted import Targeted


class LoKr(Targeted):
    """A Kronecker product as the update of linear maps."""

    name: ClassVar[str] = "lokr"
    summary: ClassVar[str] = "Kronecker-product update; very small, of high rank"
    paper: ClassVar[str] = "Yeh et al. 2023, arXiv:2309.14859"
    learning_rate: ClassVar[float] = 2e-3
    peft_type: ClassVar[str] = "LOKR"
    peft_names: ClassVar[Mapping[str, str]] = {"r": "rank", "alpha": "alpha", "target_modules": "targets"}

    rank: int = Field(8, ge=1)
    """Rank r of M."""
    alpha: float = Field(8.0, gt=0)
    """The update is scaled by alpha / rank."""

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """C ``[o1, i1]`` zero; M ``[o2, i2]``, or B ``[o2, r]`` and A ``[r, i2]``, Kaiming-uniform."""
        o1, o2 = factors(site.out_features)
        i1, i2 = factors(site.in_features)

        def kaiming(*shape: int) -> Tensor:
            bound = 1 / math.sqrt(shape[1])
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        c = {"lokr_w1": torch.zeros(o1, i1)}
        if self.rank < max(o2, i2) / 2:
            return {**c, "lokr_w2_a": kaiming(o2, self.rank), "lokr_w2_b": kaiming(self.rank, i2)}
        return {**c, "lokr_w2": kaiming(o2, i2)}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """One Kronecker delta."""
        whole = parameters.get("lokr_w2")
        m = (whole,) if whole is not None else (parameters["lokr_w2_a"], parameters["lokr_w2_b"])
        return Kron(parameters["lokr_w1"], m, self.alpha / self.rank)

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With peft's names for the same factorisation."""
        return {
            "r": self.rank,
            "alpha": self.alpha,
            "target_modules": site_map.shortest_names(sites),
            "decompose_both": False,
            "decompose_factor": -1,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses other factorisations and per-module ranks."""
        odd = [key for key in ("decompose_both", "rank_pattern", "alpha_pattern", "module_dropout") if config.get(key)]
        if odd or config.get("decompose_factor", -1) != -1:
            raise AdapterFileError(
                f"This LoKr adapter uses {', '.join(odd) or 'a factor'}, which veneer does not read."
            )
        return super().from_peft(config)


def factors(size: int) -> tuple[int, int]:
    """``(m, n)`` with m · n = size and m ≤ n as near to each other as can be."""
    m = next(m for m in range(math.isqrt(size), 0, -1) if size % m == 0)
    return m, size // m
