"""BOFT: orthogonal fine-tuning by butterfly factors (Liu et al. 2024, arXiv:2311.06243, §4, §5).

    y = s ⊙ ((x B_m … B_1) Wᵀ) + b,    B_i = P_i blockdiag(R_i1 … R_ik) P_iᵀ,    R = (I − S)(I + S)⁻¹,  S = (Q − Qᵀ)/2

OFT with m factors: each rotates blocks of β features, and the permutations P spread the blocks, so that the product is
a rotation in blocks of β·2^{m−1} for m/2^{m−1} of its numbers. s, a scale of each output, leaves the bias alone. Q = 0
and s = 1 at the start: the identity, to rounding. Merges into the weight. Trained and stored: ``m · in · β + out``
numbers a map, as in the authors' code and in peft, half of which say the same as the other half (the paper counts
``m · in · (β − 1) / 2``).

peft computes more than one factor with its CUDA extension only: without it, it makes the adapter anew with one, and a
file with more does not fit. In training peft can put random blocks out (``boft_dropout``); here there is none.

Use it where OFT's blocks are too narrow for the task at the size that can be afforded, and what the base knows must be
kept; each factor costs time like a product of width β per map, so prefer OFT, or LoRA, where time counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, Rotate, Scale, Stack
from veneer.errors import AdapterFileError, TargetError
from veneer.methods.base import BaseWeights, Lowering, widened
from veneer.methods.oft import smaller_blocks
from veneer.methods.targeted import Targeted


class BOFT(Targeted):
    """A learned rotation of each map's input, as a product of sparse ones."""

    name: ClassVar[str] = "boft"
    summary: ClassVar[str] = "rotates inputs by butterfly factors; wider rotations than OFT's from fewer numbers"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2311.06243"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "BOFT"
    peft_names: ClassVar[Mapping[str, str]] = {
        "boft_block_size": "block_size",
        "boft_n_butterfly_factor": "factors",
        "target_modules": "targets",
    }

    block_size: int = Field(8, ge=2)
    """Size β of the blocks; where it does not fit a map's input width, the next smaller size that does."""
    factors: int = Field(2, ge=1, le=16)
    """Butterfly factors m; with one it is OFT with a scale. β · 2^(m − 1) has to divide a map's input width."""

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The maps that `targets` pick.

        Raises:
            TargetError: no size of blocks would do for the input width of one.
        """
        found = super().sites(sites)
        if odd := [site for site in found if self._block(site) == 1]:
            raise TargetError(
                f"With {self.factors} butterfly factors no block_size from 2 to {self.block_size} fits "
                f"{odd[0].in_features}, the input width of {odd[0].path}: block_size · {2 ** (self.factors - 1)} has "
                "to divide it. Take fewer factors, or leave that map out."
            )
        return found

    def remarks(self, sites: Sequence[Site]) -> Sequence[str]:
        """Where blocks are smaller than asked for."""
        return smaller_blocks(self.name, self.block_size, [(self._block(site), site.in_features) for site in sites])

    def _block(self, site: Site) -> int:
        """The greatest size up to `block_size` that fits; 1 if there is none."""
        spread, even = 2 ** (self.factors - 1), 2 if self.factors > 1 else 1
        fitting = (
            size
            for size in range(min(self.block_size, site.in_features), 1, -1)
            if site.in_features % (size * spread) == 0 and size % even == 0
        )
        return next(fitting, 1)

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Q ``[m, k, β, β]``, zero; s ``[out, 1]``, one."""
        block = self._block(site)
        return {
            "boft_R": torch.zeros(self.factors, site.in_features // block, block, block),
            "boft_s": torch.ones(site.out_features, 1),
        }

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The rotation, at least in float32, and the scale, which excludes the bias."""
        q = widened(parameters["boft_R"])
        skew = (q - q.mT) / 2
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(skew)
        rotation = Rotate(torch.linalg.solve(identity + skew, identity - skew, left=False))
        bias = step.parameters(site).get("bias")
        return Stack((rotation, Scale(parameters["boft_s"].flatten(), bias)))

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """Under a name of ours where a map's blocks are smaller than asked for, which peft refuses."""
        odd = any(self._block(site) != self.block_size for site in sites)
        fixed = {"boft_block_num": 0, "boft_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}
        return super().to_peft(sites, site_map) | fixed | ({"peft_type": "VENEER_BOFT"} if odd else {})

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses blocks given by number and trained biases."""
        if odd := [key for key in ("boft_block_num", "bias") if config.get(key) not in (None, 0, "none")]:
            raise AdapterFileError(f"This BOFT adapter uses {', '.join(odd)}, which veneer does not read.")
        return super().from_peft(config)
