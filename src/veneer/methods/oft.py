"""OFT: orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280, §3; input-centric as in OFTv2, 2025).

    y = (x R) Wᵀ + b,    R = blockdiag(R_1 … R_k),    R_i = (I − Q_i)(I + Q_i)⁻¹,    Q_iᵀ = −Q_i

the Cayley transform of k skew-symmetric blocks of size β, exact here (peft's default is a Neumann series that
approximates it; files say which). Q = 0 at the start: the identity, to rounding. Merges into the weight. Trained and
stored: ``in · (β − 1) / 2`` numbers a map.

Use it where what the base knows must be kept: rotations leave norms and angles between neurons alone. Costs a
product of width β per map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, Rotate
from veneer.errors import AdapterFileError, TargetError
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.targeted import Targeted


class OFT(Targeted):
    """A learned rotation of each map's input, in blocks."""

    name: ClassVar[str] = "oft"
    summary: ClassVar[str] = "rotates the inputs of linear maps; keeps what the base knows"
    paper: ClassVar[str] = "Qiu et al. 2023, arXiv:2306.07280"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "OFT"
    peft_names: ClassVar[Mapping[str, str]] = {"oft_block_size": "block_size", "target_modules": "targets"}
    peft_checked: ClassVar[frozenset[str]] = frozenset({"use_cayley_neumann"})

    block_size: int = Field(32, ge=2)
    """Size β of the blocks; where it does not divide a map's input width, the next smaller size that does."""

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The maps that `targets` pick.

        Raises:
            TargetError: the input width of one has no divisor that would do.
        """
        found = super().sites(sites)
        if odd := [site for site in found if self._block(site) == 1]:
            raise TargetError(
                f"No block_size from 2 to {self.block_size} divides {odd[0].in_features}, the input width of "
                f"{odd[0].path}; raise block_size, or leave that map out."
            )
        return found

    def remarks(self, sites: Sequence[Site]) -> Sequence[str]:
        """Where blocks are smaller than asked for."""
        return smaller_blocks(self.name, self.block_size, [(self._block(site), site.in_features) for site in sites])

    def _block(self, site: Site) -> int:
        sizes = range(min(self.block_size, site.in_features), 0, -1)
        return next(size for size in sizes if site.in_features % size == 0)

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """The entries above the diagonals of Q, ``[k, β(β − 1)/2]``, zero."""
        block = self._block(site)
        return {"oft_R.weight": torch.zeros(site.in_features // block, block * (block - 1) // 2)}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The rotation, at least in float32."""
        entries = parameters["oft_R.weight"]
        entries = entries.to(torch.promote_types(entries.dtype, torch.float32))
        block = site.in_features // len(entries)
        rows, columns = torch.triu_indices(block, block, 1, device=entries.device)
        upper = entries.new_zeros(len(entries), block, block).index_put(
            (torch.arange(len(entries), device=entries.device)[:, None], rows, columns), entries
        )
        skew = upper - upper.mT
        identity = torch.eye(block, dtype=skew.dtype, device=skew.device).expand_as(skew)
        return Rotate(torch.linalg.solve(identity + skew, identity - skew, left=False))

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With the exact transform asked for."""
        # peft has other rules where a size doesn't divide.
        odd = any(self._block(site) != self.block_size for site in sites)
        return {
            **({"peft_type": "VENEER_OFT"} if odd else {}),
            "r": 0,
            "oft_block_size": self.block_size,
            "target_modules": site_map.shortest_names(sites),
            "use_cayley_neumann": False,
            "module_dropout": 0.0,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses the approximate transform, shared blocks and constrained rotations."""
        odd = [key for key in ("use_cayley_neumann", "block_share", "coft", "module_dropout") if config.get(key)]
        if odd or not config.get("oft_block_size"):
            raise AdapterFileError(f"This OFT adapter uses {', '.join(odd) or 'r blocks'}, which veneer does not read.")
        return super().from_peft(config)


def smaller_blocks(name: str, wanted: int, found: Sequence[tuple[int, int]]) -> list[str]:
    """What to say of maps whose blocks are smaller than wanted.

    Args:
        name: of the method.
        wanted: size of the blocks.
        found: size of the blocks, and width of the input, of each map.
    """
    counts = Counter((size, width) for size, width in found if size != wanted)
    return [
        f"{name}: block_size {wanted} does not fit inputs of width {width}, so {count} of {len(found)} maps have "
        f"blocks of {size}."
        for (size, width), count in counts.items()
    ]
