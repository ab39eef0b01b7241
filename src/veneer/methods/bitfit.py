"""BitFit: only biases are trained (Ben Zaken et al. 2022, arXiv:2106.10199, §3).

    y ← y + b          b zero at the start, for every linear map and norm that has a bias

so that the bias trained is ``bias + b``. A base without any biases (Llama) gets new ones on its linear maps. The
adapted model starts out bit-equal to the base. Merges where the module has a bias to merge into.

Use it on encoders with little data; it trains less than a thousandth of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Bias, Delta
from veneer.methods.base import BaseWeights, Lowering, Method


class BitFit(Method):
    """Trains biases only."""

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "trains biases only"
    paper: ClassVar[str] = "Ben Zaken et al. 2022, arXiv:2106.10199"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "VENEER_BITFIT"

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """Linear maps inside the layers and norms, those with biases; without any, all linear maps in the layers."""
        inside = [s for s in sites.everything if s.kind == "norm" or (s.kind == "linear" and s.layer is not None)]
        with_bias = [site for site in inside if site.bias]
        return with_bias or sites.resolve("all-linear")

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """``[out]``, zero."""
        return {"bias_delta": torch.zeros(site.out_features)}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """An added bias."""
        return Bias(parameters["bias_delta"])

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """Nothing to tell: peft has no such method by itself."""
        return {}
