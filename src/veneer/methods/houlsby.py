"""Houlsby adapters, "adapter tuning" (Houlsby et al. 2019, arXiv:1902.00751, §2.1).

    h ← h + W_u · act(W_d h + b_d) + b_u

twice a layer: on the output of the attention branch and of the feed-forward branch, each before its residual is
added. Trained and stored: ``2 m d + m + d`` numbers each. The paper starts W_u near zero; here it starts at zero, so
that the adapted model is bit-equal to the base. Norms can be trained too (the paper does). Not mergeable.

Use it for encoders and where a little extra time per token is no matter; for serving without that cost use LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Bottleneck, Delta
from veneer.errors import TargetError
from veneer.methods.base import BaseWeights, Lowering, Method

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Houlsby(Method):
    """A bottleneck after each residual branch."""

    name: ClassVar[str] = "houlsby"
    aliases: ClassVar[tuple[str, ...]] = ("adapter-bert",)
    summary: ClassVar[str] = "bottleneck adapters after attention and feed-forward"
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv:1902.00751"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "VENEER_HOULSBY"

    bottleneck: int = Field(64, ge=1)
    """Width m of the bottleneck."""
    activation: str = Field("gelu", pattern="^(gelu|relu|silu|tanh)$")
    """Its nonlinearity: gelu, relu, silu or tanh."""

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The outputs of all residual branches."""
        found = [*sites.branches("attention"), *sites.branches("mlp")]
        if not found:
            raise TargetError("This base has no residual branches that veneer knows to put bottlenecks after.")
        return found

    def width(self, site: Site) -> int:
        """m at a site."""
        return self.bottleneck

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Down normal(0.02), up zero, biases zero."""
        m, d = self.width(site), site.out_features
        return {
            "adapter_down.weight": torch.randn(m, d, generator=generator) * 0.02,
            "adapter_down.bias": torch.zeros(m),
            "adapter_up.weight": torch.zeros(d, m),
            "adapter_up.bias": torch.zeros(d),
        }

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """One sequential bottleneck."""
        return Bottleneck(
            parameters["adapter_down.weight"],
            parameters["adapter_down.bias"],
            parameters["adapter_up.weight"],
            parameters["adapter_up.bias"],
            ACTIVATIONS[self.activation],
        )

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """As it is: peft has no such method."""
        return self.model_dump(mode="json")
