"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353, §4).

    W' = m ⊙ (W + s·BA) / ‖W + s·BA‖        norms by output row, not differentiated (§4.3)
    y  = (x (W + s·BA)ᵀ) ⊙ m / ‖·‖ + b

m starts as the norms of W: bit-equal to the base. The norms come from those of W and small products, without forming
the update (‖W + sBA‖² = ‖W‖² + 2s ⟨WAᵀ, B⟩ + s² ⟨B AAᵀ, B⟩, row by row). Merges. Trained and stored: LoRA's numbers and
``out`` a map.

Use it where LoRA of a small rank falls short of full fine-tuning; it costs more time a step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, LowRank, Scale, Stack
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.lora import LoRA

_MAGNITUDE = "lora_magnitude_vector"


class DoRA(LoRA):
    """LoRA with the length of each row of the weight trained apart from its direction."""

    name: ClassVar[str] = "dora"
    summary: ClassVar[str] = "LoRA with magnitudes trained apart from directions"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2402.09353"
    learning_rate: ClassVar[float] = 5e-4
    kinds: ClassVar[Collection[str]] = ("linear",)

    dropout: float = Field(0.0, ge=0, le=0)
    """None: the norms are those of the whole update."""
    bias: Literal[False] = False
    """None."""
    init: Literal["kaiming", "gaussian", "orthogonal", "eva"] = "kaiming"
    """What the factors start from."""

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """LoRA's, and m ``[out]``."""
        factors = super().parameters(site, generator, base)
        weight = base.parameters(site)["weight"].detach()
        return {**factors, _MAGNITUDE: _square_norms(weight).sqrt()}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The low-rank delta, then a scale that leaves the bias alone."""
        own, a, b = step.parameters(site), parameters["lora_A.weight"], parameters["lora_B.weight"]
        scale = self.scale_at(site)
        with torch.no_grad():
            weight = own["weight"]
            cross = ((weight @ a.mT.to(weight.dtype)) * b).sum(1)  # a small part of the norm: its own dtype will do
            update = ((b @ (a @ a.mT)) * b).sum(1)
            norms = (_square_norms(weight) + 2 * scale * cross + scale**2 * update).sqrt()
        return Stack((LowRank(a, b, scale), Scale(parameters[_MAGNITUDE] / norms, own.get("bias"))))

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """As LoRA with a flag."""
        return super().to_peft(sites, site_map) | {"use_dora": True}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """LoRA's with the flag."""
        return super(LoRA, cls).reads(config) and bool(config.get("use_dora"))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """As LoRA's."""
        return super().from_peft({**config, "use_dora": False})


def _square_norms(weight: Tensor) -> Tensor:
    """``[out]``, summed in at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
