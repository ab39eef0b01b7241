"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, §4.1).

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ,     s = α / r, or α / √r when rank-stabilised (Kalajdzievski 2023)

A is Kaiming-uniform(√5), as in the authors' code; B is zero, so the adapted model starts out bit-equal to the
base. Trained and stored: r · (in + out) numbers a site. Merges into the weight.

Use it first: it learns well on all linear layers at about ten times full fine-tuning's learning rate, costs
nothing once merged, and every server reads it. Prefer a smaller method where thousands of adapters must be kept
or only some dozen rows are there to learn from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.bases.sites import EMBEDDING
from veneer.deltas import ConvLowRank, EmbeddingLowRank, LowRank
from veneer.errors import AdapterFileError, TargetError
from veneer.methods.base import Lowering
from veneer.methods.targeted import Targeted

# Settings of peft's LoraConfig that change what is computed; each must be at its default for us to read the file.
_NOT_READ = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "use_qalora",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)


def _convolve(module: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """The module's own convolution (stride, padding and all) with another kernel."""
    return module._conv_forward(x, kernel, None)


class LoRA(Targeted):
    """Low-rank adaptation of linear maps."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank update of linear maps; the one to try first"
    learning_rate: ClassVar[float] = 5e-4
    peft_type: ClassVar[str] = "LORA"
    peft_names: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "target_modules": "targets",
        "use_rslora": "rank_stabilized",
    }

    rank: int = Field(16, ge=1)
    """Rank r of the update."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of zeroing an input feature of A in training."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead, so that large ranks learn as fast."""

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The maps that `targets` pick.

        Raises:
            TargetError: the rank is more than any of them can have.
        """
        found = super().sites(sites)
        if self.rank > (most := max(min(site.in_features, site.out_features) for site in found)):
            raise TargetError(
                f"rank {self.rank} is more than these maps can have, which is {most}; LoRA uses 4 to 128."
            )
        return found

    def parameters(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """``A [r, in, *kernel]`` Kaiming-uniform, ``B [out, r]`` zero; for embeddings the other way round."""
        if site.kind == EMBEDDING:
            b = torch.randn(site.out_features, self.rank, generator=generator)
            return {"lora_embedding_A": torch.zeros(self.rank, site.in_features), "lora_embedding_B": b}
        bound = 1 / math.sqrt(site.in_features * math.prod(site.kernel))  # what kaiming_uniform_(a=√5) comes to
        a = torch.empty(self.rank, site.in_features, *site.kernel).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(site.out_features, self.rank, *[1] * len(site.kernel))
        return {"lora_A.weight": a, "lora_B.weight": b}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> LowRank:
        """One low-rank delta."""
        dropout = self.dropout if step.training else 0.0
        if site.kind == EMBEDDING:
            a, b = parameters["lora_embedding_A"], parameters["lora_embedding_B"]
            return EmbeddingLowRank(a, b, self.scale)
        a, b = parameters["lora_A.weight"], parameters["lora_B.weight"]
        if site.kind == "conv":
            convolution = step.model.get_submodule(site.path)
            return ConvLowRank(a, b, self.scale, dropout, convolve=partial(_convolve, convolution))
        return LowRank(a, b, self.scale, dropout)

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With the settings of peft's that are fixed here."""
        return super().to_peft(sites, site_map) | {"bias": "none", "init_lora_weights": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses settings that would change the result: DoRA, biases, per-module ranks and the like."""
        odd = [key for key in _NOT_READ if config.get(key)]
        odd += ["bias"] if config.get("bias", "none") != "none" else []
        if odd:
            raise AdapterFileError(f"This LoRA adapter uses {', '.join(odd)}, which veneer does not read yet.")
        return super().from_peft(config)
