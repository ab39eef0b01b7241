"""Uni-LoRA: all low-rank factors from one vector (Li et al. 2025, arXiv:2506.00799, §3).

    W ← W + B A − B₀ A₀,     every entry of every A and B   = θ_g / √c_g

with one bank θ ∈ R^D for the whole model and a seeded, balanced assignment g of entries to the bank, fixed: each number
of the bank stands in c_g places, ⌊N/D⌋ or ⌈N/D⌉ of all N entries. So the map from θ to the factors is isometric, and
training in it is training along D random directions of LoRA's. θ starts uniform(−0.02, 0.02), not zero, where factors
have no gradient; B₀A₀, what it comes to there, is taken off again, so that the adapted model starts equal to the base
(to rounding). The paper and peft leave it in: ``identity: false``, with which folders are peft's. Merges; runs, mixes
and exports as LoRA of rank r, or 2r with B₀A₀. Trained: D numbers. Stored: D, and as many of the start. g is peft's, by
numpy's generator, and can be kept in the files.

Use it where an adapter should be as small as can be and LoRA-shaped. It takes LoRA's time and, for g, LoRA's memory;
it learns less than LoRA of the same rank, about as much as others of D numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, LowRank
from veneer.errors import AdapterFileError, TargetError
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.targeted import Targeted

_BANK = "base_model.unilora_theta_d"
_START = "base_model.unilora_theta_d.start"
_INDICES = ("unilora_indices_A", "unilora_indices_B")
_SCALES = ("unilora_scales_A", "unilora_scales_B")


class UniLoRA(Targeted):
    """Low-rank updates whose entries all come from one vector."""

    name: ClassVar[str] = "unilora"
    example: ClassVar[Mapping[str, Any]] = {"bank_size": 64}
    summary: ClassVar[str] = "all low-rank factors from one shared vector; as small as wanted"
    paper: ClassVar[str] = "Li et al. 2025, arXiv:2506.00799"
    learning_rate: ClassVar[float] = 5e-3
    peft_type: ClassVar[str] = "UNILORA"
    peft_names: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "theta_d_length": "bank_size",
        "proj_seed": "seed",
        "unilora_dropout": "dropout",
        "init_theta_d_bound": "bound",
        "save_indices": "keep_indices",
        "target_modules": "targets",
    }

    rank: int = Field(4, ge=1)
    """Rank r of the updates."""
    bank_size: int = Field(23_040, ge=1)
    """Numbers D in the bank: all that is trained."""
    seed: int = Field(42, ge=0)
    """Of the assignment."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of zeroing an input feature of A in training."""
    bound: float = Field(0.02, gt=0)
    """The bank starts uniform between minus this and this."""
    identity: bool = True
    """Take off what the factors come to at the start."""
    keep_indices: bool = False
    """Write the assignment into the adapter's files, too: as large as LoRA's, but safe from changes of numpy's
    generator."""

    def fixed(self) -> Collection[str]:
        """The start, and the assignment if it is kept."""
        return (_START, *((*_INDICES, *_SCALES) if self.keep_indices else ()))

    def derived(self) -> Collection[str]:
        """The assignment, if it isn't."""
        return () if self.keep_indices else (*_INDICES, *_SCALES)

    def shared(self, sites: Sequence[Site], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """θ ``[D]``, and what it starts from."""
        bank = torch.empty(self.bank_size).uniform_(-self.bound, self.bound, generator=generator)
        return {_BANK: bank, **({_START: bank.clone()} if self.identity else {})}

    def initial(
        self, sites: Sequence[Site], generator: torch.Generator, base: BaseWeights
    ) -> dict[str, dict[str, Tensor]]:
        """For A ``[r, in]`` and B ``[out, r]`` of each map where in the bank its entries stand, and 1/√c."""
        shapes = [((self.rank, site.in_features), (site.out_features, self.rank)) for site in sites]
        sizes = [rows * columns for pair in shapes for rows, columns in pair]
        if self.bank_size > sum(sizes):
            raise TargetError(f"bank_size={self.bank_size:,} is more than the {sum(sizes):,} entries that share it.")
        assigned = torch.from_numpy(assignment(sum(sizes), self.bank_size, self.seed)).to(torch.int32)
        scales = torch.bincount(assigned, minlength=self.bank_size).float().rsqrt()
        pieces = iter(assigned.split(sizes))
        values: dict[str, dict[str, Tensor]] = {}
        for site, pair in zip(sites, shapes, strict=True):
            indices = [next(pieces).clone().view(shape) for shape in pair]
            values[site.path] = {
                **dict(zip(_INDICES, indices, strict=True)),
                **dict(zip(_SCALES, (scales[each] for each in indices), strict=True)),
            }
        return values

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A low-rank delta; without the start's, of twice the rank."""
        a, b = self._factors(parameters, parameters[_BANK])
        if self.identity:
            a0, b0 = self._factors(parameters, parameters[_START])
            a, b = torch.cat([a, a0]), torch.cat([b, -b0], 1)
        return LowRank(a, b, 1.0, self.dropout if step.training else 0.0)

    def _factors(self, parameters: Mapping[str, Tensor], bank: Tensor) -> list[Tensor]:
        return [
            F.embedding(parameters[index], bank[:, None])[..., 0] * parameters[scale]
            for index, scale in zip(_INDICES, _SCALES, strict=True)
        ]

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With what is fixed here; peft takes nothing off."""
        fields = super().to_peft(sites, site_map) | {"bias": "none", "fan_in_fan_out": False}
        return fields | ({"peft_type": "VENEER_UNILORA"} if fields.pop("identity") else {})

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Nothing taken off; refuses trained biases."""
        if config.get("bias", "none") != "none":
            raise AdapterFileError("This Uni-LoRA adapter trains biases of the base, which veneer does not read.")
        return super().from_peft(config).model_copy(update={"identity": False})


def assignment(entries: int, bank_size: int, seed: int) -> numpy.ndarray[Any, numpy.dtype[numpy.int64]]:
    """Which number of the bank each entry takes ``[entries]``: all equally often, those left over drawn, then shuffled.

    The draws are those of peft, whose files need not tell them.
    """
    each, left = divmod(entries, bank_size)
    generator = numpy.random.default_rng(seed)
    assigned = numpy.repeat(numpy.arange(bank_size), each)
    if left:
        assigned = numpy.concatenate([assigned, generator.choice(bank_size, size=left, replace=False)])
    generator.shuffle(assigned)
    return assigned
