"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2024, arXiv:2310.11454, §3.1).

    W ← W + diag(b) B diag(d) A

A and B random, frozen and shared by all maps (each takes the corner it has use for); the vectors d and b are trained.
b is zero at the start: the adapted model is bit-equal to the base. Merges; runs, mixes and exports as plain LoRA.
Trained and stored: ``r + out`` numbers a map; A and B follow from the seed.

Use it where thousands of adapters are kept. It wants a high learning rate and a high rank, which costs time as LoRA
of that rank does, and learns less than LoRA on hard tasks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, ScaledLowRank
from veneer.errors import AdapterFileError
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.targeted import Targeted

_A, _B = "base_model.vera_A", "base_model.vera_B"


class VeRA(Targeted):
    """Trained scales of shared random factors."""

    name: ClassVar[str] = "vera"
    summary: ClassVar[str] = "scales shared random low-rank factors; tiny adapters"
    paper: ClassVar[str] = "Kopiczko et al. 2024, arXiv:2310.11454"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "VERA"
    peft_names: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "d_initial": "d_initial",
        "projection_prng_key": "seed",
        "save_projection": "keep_factors",
        "target_modules": "targets",
    }

    rank: int = Field(256, ge=1)
    """Rank r of the shared factors."""
    d_initial: float = 0.1
    """What d starts from."""
    seed: int = 0
    """Of A and B."""
    keep_factors: bool = False
    """Write A and B into the adapter's files, too."""

    def fixed(self) -> Collection[str]:
        """A and B, if they are kept."""
        return (_A, _B) if self.keep_factors else ()

    def derived(self) -> Collection[str]:
        """A and B, if they aren't."""
        return () if self.keep_factors else (_A, _B)

    def shared(self, sites: Sequence[Any], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """A ``[r, widest input]`` and B ``[widest output, r]``, Kaiming-uniform, by the method's seed as in peft."""
        own = torch.Generator().manual_seed(self.seed)
        shapes = (self.rank, max(s.in_features for s in sites)), (max(s.out_features for s in sites), self.rank)
        values = []
        for shape in shapes:
            bound = math.sqrt(6 / shape[1])
            values.append(torch.empty(shape).uniform_(-bound, bound, generator=own))
        return {_A: values[0], _B: values[1]}

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """b ``[out]``, zero; d ``[r]``."""
        return {
            "vera_lambda_b": torch.zeros(site.out_features),
            "vera_lambda_d": torch.full((self.rank,), self.d_initial),
        }

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A low-rank delta of the corners, scaled."""
        a, b = parameters[_A][:, : site.in_features], parameters[_B][: site.out_features]
        return ScaledLowRank(a, b, parameters["vera_lambda_d"], parameters["vera_lambda_b"])

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With what is fixed here."""
        return super().to_peft(sites, site_map) | {"bias": "none", "vera_dropout": 0.0, "fan_in_fan_out": False}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses trained biases."""
        if config.get("bias", "none") != "none":
            raise AdapterFileError("This VeRA adapter trains biases of the base, which veneer does not read.")
        return super().from_peft(config)
