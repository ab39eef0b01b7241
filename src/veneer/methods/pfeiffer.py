"""Pfeiffer adapters (Pfeiffer et al. 2021, arXiv:2005.00247, §2.2 and appendix A).

    h ← h + W_u · relu(W_d h + b_d) + b_u

once a layer: on the output of the feed-forward branch, before its residual is added; half of Houlsby's numbers at the
same width, and nearly its scores. The width is a share of the layer's: m = d / 16. Starts bit-equal to the base. Not
mergeable.

Use it as Houlsby's, where adapters are to be smaller, or fused later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from veneer.bases import Site, SiteMap
from veneer.errors import TargetError
from veneer.methods.houlsby import Houlsby


class Pfeiffer(Houlsby):
    """A bottleneck after each feed-forward branch."""

    name: ClassVar[str] = "pfeiffer"
    aliases: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "bottleneck adapters after feed-forward only; half of Houlsby's size"
    paper: ClassVar[str] = "Pfeiffer et al. 2021, arXiv:2005.00247"
    peft_type: ClassVar[str] = "VENEER_PFEIFFER"

    bottleneck: int | None = Field(None, ge=1)  # type: ignore[assignment]
    """Width m; by default the layer's divided by `reduction`."""
    reduction: int = Field(16, ge=1)
    """The layer's width over m."""
    activation: str = Field("relu", pattern="^(gelu|relu|silu|tanh)$")
    """Its nonlinearity: gelu, relu, silu or tanh."""

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The outputs of the feed-forward branches."""
        found = sites.branches("mlp")
        if not found:
            raise TargetError("This base has no feed-forward branches that veneer knows to put bottlenecks after.")
        return found

    def width(self, site: Site) -> int:
        """m at a site."""
        return self.bottleneck or max(site.out_features // self.reduction, 1)
