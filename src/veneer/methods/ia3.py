"""IA3: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al. 2022, arXiv:2205.05638, §3.3).

    softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V),        (l_ff ⊙ γ(W₁ x)) W₂

Keys and values are scaled at their maps' outputs, bias included; inner activations of the feed-forward block at the
input of its last map. Where queries, keys and values come from one fused map, all of its outputs are scaled, as in
peft. All vectors start at one: the adapted model is bit-equal to the base. Merges.

Use it when adapters must be tiny (a few hundred kilobytes for billions of parameters) and few rows are at hand; with
more data LoRA learns more. It wants a high learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, InputScale, Scale
from veneer.errors import TargetError
from veneer.methods.base import BaseWeights, Lowering, Method


class IA3(Method):
    """Learned scales of keys, values and inner activations."""

    name: ClassVar[str] = "ia3"
    summary: ClassVar[str] = "scales keys, values and inner activations; tiny adapters, few examples"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2205.05638"
    learning_rate: ClassVar[float] = 3e-3
    peft_type: ClassVar[str] = "IA3"

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """Keys, values and the last map of each feed-forward block, inside the layers."""
        found = [site for site in sites if site.role in ("k", "v", "qkv", "down") and site.layer is not None]
        if not found:
            raise TargetError("IA3 finds neither keys and values nor feed-forward blocks in this base.")
        return found

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """One scale a feature, in peft's shapes: ``[out, 1]``, or ``[1, in]`` at an input."""
        shape = (1, site.in_features) if site.role == "down" else (site.out_features, 1)
        return {"ia3_l": torch.ones(shape)}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A scale of the output, or of the input."""
        v = parameters["ia3_l"].flatten()
        return InputScale(v) if site.role == "down" else Scale(v)

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """peft is told which of its targets scale inputs."""
        return {
            "target_modules": site_map.shortest_names(sites),
            "feedforward_modules": site_map.shortest_names([site for site in sites if site.role == "down"]),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }
