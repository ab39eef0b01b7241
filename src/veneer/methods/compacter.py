"""Compacter (Karimi Mahabadi et al. 2021, arXiv:2106.04647, §3): bottlenecks of parametrised hypercomplex products.

    W_d, W_u = Σ_{i=1..n} A_i ⊗ (s_i t_i),    A_i ∈ R^{n×n},  s_i ∈ R^{(in/n)×r},  t_i ∈ R^{r×(out/n)}

in Houlsby's places. The A_i are one set for the whole base, in both projections of every bottleneck, as in the paper
(popular ports keep one for each); s and t are each projection's own. Not mergeable. Trained and stored, per
projection: ``n r (in/n + out/n) + out`` numbers, and n³ once.

The paper starts near the identity; here t of the up-projection starts at zero, which is the identity to the bit. Use
it where bottlenecks are wanted at a hundredth of their size. With `places: mlp` it is Compacter++.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Bottleneck, Delta
from veneer.errors import TargetError
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.houlsby import ACTIVATIONS, Houlsby

_RULES = "base_model.model.phm_rule"


class Compacter(Houlsby):
    """Bottlenecks made of Kronecker products with shared factors."""

    name: ClassVar[str] = "compacter"
    aliases: ClassVar[tuple[str, ...]] = ("adapter-comet",)
    summary: ClassVar[str] = "bottleneck adapters of Kronecker products; a hundredth of Houlsby's size"
    paper: ClassVar[str] = "Karimi Mahabadi et al. 2021, arXiv:2106.04647"
    learning_rate: ClassVar[float] = 3e-3
    peft_type: ClassVar[str] = "VENEER_COMPACTER"

    bottleneck: int | None = Field(None, ge=1)  # type: ignore[assignment]
    """Width m; by default the layer's divided by `reduction`."""
    reduction: int = Field(32, ge=1)
    """The layer's width over m."""
    n: int = Field(4, ge=1)
    """How many products are summed; it divides m and the layers' width."""
    rank: int = Field(1, ge=1)
    """Rank r of their second factors."""
    places: Literal["both", "mlp"] = "both"
    """After attention and feed-forward, or after feed-forward only (Compacter++)."""

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """Houlsby's, or the feed-forward ones of them.

        Raises:
            TargetError: there are none, or n doesn't divide a width.
        """
        found = super().sites(sites) if self.places == "both" else sites.branches("mlp")
        if not found:
            raise TargetError("This base has no feed-forward branches that veneer knows to put bottlenecks after.")
        for site in found:
            if site.out_features % self.n or self.width(site) % self.n:
                raise TargetError(
                    f"n={self.n} divides not both {site.out_features}, the width of {site.path}, and the bottleneck's "
                    f"{self.width(site)}; set n or bottleneck."
                )
        return found

    def width(self, site: Site) -> int:
        """m at a site, a multiple of n."""
        return self.bottleneck or max(site.out_features // self.reduction // self.n, 1) * self.n

    def shared(self, sites: Sequence[Any], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """A ``[n, n, n]``, normal(0.01)."""
        return {_RULES: torch.randn(self.n, self.n, self.n, generator=generator) * 0.01}

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """s ``[n, in/n, r]`` and t ``[n, r, out/n]`` Xavier-uniform(√2), but for the up-projection's t, and biases."""
        d, m = site.out_features, self.width(site)
        down, up = (d // self.n, m // self.n), (m // self.n, d // self.n)

        def xavier(fan_in: int, fan_out: int) -> Tensor:
            bound = math.sqrt(2) * math.sqrt(6 / (fan_in + fan_out))
            return torch.empty(self.n, fan_in, fan_out).uniform_(-bound, bound, generator=generator)

        return {
            "adapter_down.s": xavier(down[0], self.rank),
            "adapter_down.t": xavier(self.rank, down[1]),
            "adapter_down.bias": torch.zeros(m),
            "adapter_up.s": xavier(up[0], self.rank),
            "adapter_up.t": torch.zeros(self.n, self.rank, up[1]),
            "adapter_up.bias": torch.zeros(d),
        }

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """One sequential bottleneck; its matrices are formed, once a step: they are small."""

        def projection(name: str) -> Tensor:
            inner = parameters[f"{name}.s"] @ parameters[f"{name}.t"]
            products = torch.einsum("nab,nio->aibo", parameters[_RULES], inner)
            return products.flatten(2).flatten(0, 1).mT

        return Bottleneck(
            projection("adapter_down"),
            parameters["adapter_down.bias"],
            projection("adapter_up"),
            parameters["adapter_up.bias"],
            ACTIVATIONS[self.activation],
        )
