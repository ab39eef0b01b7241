"""SHiRA: sparse high-rank adapters (Bhardwaj et al. 2024, arXiv:2406.13175, §3).

    W ← W + s · ΔW,     ΔW zero but for nnz fixed entries

Here with the random mask (SHiRA-Rand), as many entries as LoRA of rank r would train: ``r (in + out)``. Starts at
zero: bit-equal to the base. Merges. Adapters on disjoint entries add up without interference.

Use it when several adapters are to be combined, or when one is switched often on a device: only nnz weights change.
In training it costs a full weight gradient per map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, Sparse
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.entries import distinct, matrix_fault
from veneer.methods.targeted import Targeted


class SHiRA(Targeted):
    """A sparse update on a fixed random mask."""

    name: ClassVar[str] = "shira"
    summary: ClassVar[str] = "sparse update of fixed random entries"
    paper: ClassVar[str] = "Bhardwaj et al. 2024, arXiv:2406.13175"
    learning_rate: ClassVar[float] = 2e-3
    peft_type: ClassVar[str] = "SHIRA"
    peft_names: ClassVar[Mapping[str, str]] = {"r": "rank", "target_modules": "targets"}

    rank: int = Field(16, ge=1)
    """As many entries are trained as LoRA of this rank would have numbers."""

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Values ``[nnz]``, zero; indices ``[2, nnz]``, fixed: row and column."""
        total = site.in_features * site.out_features
        count = min(self.rank * (site.in_features + site.out_features), total)
        chosen = distinct(count, total, generator)
        indices = torch.stack([chosen // site.in_features, chosen % site.in_features])
        return {"shira_weight": torch.zeros(count), "shira_indices": indices.to(torch.int32)}

    def fault(self, site: Site, parameters: Mapping[str, Tensor]) -> str | None:
        """Indices must lie in the weight."""
        return matrix_fault(
            parameters["shira_weight"], parameters["shira_indices"], site.out_features, site.in_features
        )

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A sparse change of the weight."""
        rows, columns = parameters["shira_indices"]
        return Sparse(rows, columns, parameters["shira_weight"])

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With targets in module names."""
        return {"r": self.rank, "target_modules": site_map.shortest_names(sites), "mask_type": "random"}
