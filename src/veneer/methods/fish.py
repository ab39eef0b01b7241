"""FISH mask (Sung et al. 2021, arXiv:2111.09839, §3).

    W ← W + ΔW,     ΔW zero but for the k entries of all maps whose Fisher information is greatest

    F_i = 1/N · Σ_n (∂ log p(y_n | x_n) / ∂ W_i)²        the empirical diagonal of N examples, one at a time

Before the first step, N = 1,024 rows of the training data are gone through, forward and backward, with the base as it
is; the mask is fixed from then on. What is added starts at zero, so the adapted model starts out bit-equal to the
base, and entries outside the mask never move, whatever weight decay or the optimiser's momentum do. Merges. Trained:
k numbers, k = share · (numbers of all targeted weights); stored: k numbers and their rows and columns.

The paper masks all parameters; here linear maps (`targets`), and embeddings by name. Without a look at data (a loop of
one's own) the entries are random ones.

Use it where a small adapter is to change the weights that the task hangs on, or where disjoint sparse adapters are to
be added up; a step costs a full weight gradient for each map, and the pass before it costs as much as N more rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site
from veneer.bases.quantized import kind_of
from veneer.bases.site import EMBEDDING
from veneer.deltas import Delta, Sparse
from veneer.errors import TargetError
from veneer.methods.base import BaseWeights, Lowering, State, Survey
from veneer.methods.entries import INDICES, VALUES, distinct, entries, greatest, matrix_fault
from veneer.methods.targeted import Targeted


class FISH(Targeted):
    """A sparse update on the entries with the greatest Fisher information."""

    name: ClassVar[str] = "fish"
    paper: ClassVar[str] = "Sung et al. 2021, arXiv:2111.09839"
    summary: ClassVar[str] = "sparse update of the entries that matter most to the data"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "VENEER_FISH"
    kinds: ClassVar[Collection[str]] = ("linear", EMBEDDING)

    share: float = Field(0.005, gt=0, le=1)
    """Share of the entries of all targeted weights that is trained."""
    examples: int = Field(1024, ge=1)
    """Rows the Fisher information is estimated from; all, where there are fewer."""

    def sized(self) -> Collection[str]:
        """Both: the data decide how many of a map's entries are trained."""
        return VALUES, INDICES

    def initial(
        self, sites: Sequence[Site], generator: torch.Generator, base: BaseWeights
    ) -> dict[str, dict[str, Tensor]]:
        """Random entries, spread evenly, as many in all maps together as there will be once the data have been seen."""
        shapes = {}
        for site in sites:
            own = base.model.get_submodule(site.module)._parameters[site.parameter or "weight"]
            if kind_of(own) is not None and not base.loading:
                raise TargetError(f"fish needs the weights' gradients, and {site.path} is quantised: it has none.")
            shapes[site.path] = base.parameters(site)["weight"].shape
        total, start = sum(shape.numel() for shape in shapes.values()), 0
        k, values = self.count(total), {}
        for path, shape in shapes.items():
            end = start + shape.numel()
            values[path] = entries(distinct(k * end // total - k * start // total, end - start, generator), shape[-1])
            start = end
        return values

    def count(self, total: int) -> int:
        """k of so many entries."""
        return max(round(self.share * total), 1)

    def surveys(self) -> bool:
        """Always."""
        return True

    def surveyed(
        self,
        sites: Sequence[Site],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
        survey: Survey,
    ) -> State:
        """The entries with the greatest Fisher information."""
        fisher: dict[str, Tensor] = {}
        for gradients in survey.gradients(sites, self.examples):
            for path, gradient in gradients.items():
                squares = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
                fisher[path] = fisher[path].add_(squares) if path in fisher else squares
        total = sum(value.numel() for value in fisher.values())
        chosen = greatest(fisher, self.count(total))
        unused = torch.empty(0, dtype=torch.long)
        return (
            self,
            {
                path: entries(chosen.get(path, unused), fisher[path].shape[-1] if path in fisher else 1)
                for path in parameters
            },
            shared,
        )

    def fault(self, site: Site, parameters: Mapping[str, Tensor]) -> str | None:
        """Indices must lie in the weight, which embeddings store the other way round."""
        size = (site.out_features, site.in_features)
        return matrix_fault(parameters[VALUES], parameters[INDICES], *(size[::-1] if site.kind == EMBEDDING else size))

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A sparse change of the weight."""
        rows, columns = parameters[INDICES]
        return Sparse(rows, columns, parameters[VALUES])
