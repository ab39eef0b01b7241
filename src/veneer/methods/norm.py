"""Norm tuning: the scales and biases of the norms (Zhao et al. 2024, arXiv:2312.11420).

    LayerNorm(x; g, b)  with g and b trained, in all norms over features

They start as copies of the base's: the adapted model is bit-equal to it. Merges. Trained and stored: one or two numbers
a feature and norm.

Use it as the smallest change worth trying, or beside others; it costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, Replace
from veneer.errors import TargetError
from veneer.methods.base import BaseWeights, Lowering, Method, widened

_PREFIX = "ln_tuning_layers."


class Norm(Method):
    """Trains the norms."""

    name: ClassVar[str] = "norm"
    summary: ClassVar[str] = "trains scales and biases of the norms only"
    paper: ClassVar[str] = "Zhao et al. 2024, arXiv:2312.11420"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "LN_TUNING"

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """All norms over features."""
        found = [site for site in sites.everything if site.kind == "norm"]
        if not found:
            raise TargetError("This base has no norms over features with parameters of their own.")
        return found

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Copies of the norm's."""
        own = base.parameters(site).items()
        return {_PREFIX + name: widened(value.detach()).clone() for name, value in own}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The norm runs on these."""
        return Replace({name.removeprefix(_PREFIX): value for name, value in parameters.items()})

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With targets in module names."""
        return {"target_modules": site_map.shortest_names(sites)}
