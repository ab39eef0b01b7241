"""Randomised parameter sharing: the update of all maps from one vector (HashedNets, Chen et al. 2015,
arXiv:1504.04788; ROAST, Desai et al. 2023, arXiv:2207.10702; as adapters MoSA, Wang et al. 2026, ICLR, which has a
vector for each matrix).

    W_ij ← W_ij ± θ_g / √c_g,     g = g(n), ± = ±(n),    n the number of the entry among those of all maps

with one bank θ ∈ R^D, a power of two, for the whole model, zero at the start: bit-equal to the base. g is balanced: the
entries are dealt out D at a time, each time in an order of its own, so that every number of the bank stands in
c_g = ⌊N/D⌋ or ⌈N/D⌉ of all N entries, and never twice within D in a row. The order and the signs come from integer
arithmetic alone (`placed`), by the seed: the same on every machine and with every version of torch. Nothing but θ is
stored; g is computed anew in tiles in each pass, forward and backward, and never for more than a tile. Merges. Trained
and stored: D numbers.

Use it where the size of an adapter is given and nothing is known of where it is needed: of full rank at any size. A
step costs a hash of every weight, and rows of a batch can't share it: prefer `unilora` or LoRA where time counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, OfWeight
from veneer.errors import TargetError
from veneer.kernels.rounds import in_steps
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.targeted import Targeted

_BANK, _COUNTS, _FIRST = "base_model.rps_bank", "base_model.rps_counts", "rps_first"
_TILE = 2**20
"""Entries at a time: some dozen megabytes of indices."""
_WORD = 2**32 - 1


class RPS(Targeted):
    """One bank of numbers, shared at random by all entries of all maps."""

    name: ClassVar[str] = "rps"
    summary: ClassVar[str] = "every weight's change from one shared vector, by a hash; full rank at any size"
    paper: ClassVar[str] = "Chen et al. 2015, arXiv:1504.04788"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "VENEER_RPS"

    bank_size: int = Field(65_536, ge=2)
    """Numbers D in the bank, all that is trained: a power of two."""
    seed: int = Field(0, ge=0, le=_WORD)
    """Of the assignment and the signs."""
    hash: Literal["v1"] = "v1"
    """Version of the assignment."""

    @model_validator(mode="after")
    def _is_power_of_two(self) -> Self:
        if self.bank_size & (self.bank_size - 1):
            near = 2 ** (self.bank_size.bit_length() - 1)
            raise ValueError(f"bank_size {self.bank_size} is no power of two, as {near} and {2 * near} are")
        return self

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The maps that `targets` pick.

        Raises:
            TargetError: they have fewer entries than the bank.
        """
        found = super().sites(sites)
        if (entries := _entries(found)) < self.bank_size:
            raise TargetError(
                f"bank_size {self.bank_size:,} is more than these maps have entries, {entries:,}; full fine-tuning of "
                "them is smaller."
            )
        return found

    def derived(self) -> Collection[str]:
        """Where each map's entries begin, and how often each number of the bank stands."""
        return (_COUNTS, _FIRST)

    def shared(self, sites: Sequence[Site], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """θ ``[D]``, zero, and how many entries each of its numbers stands in."""
        rounds, rest = divmod(_entries(sites), self.bank_size)
        counts = torch.full((self.bank_size,), rounds, dtype=torch.int32)
        for start in range(0, rest, _TILE):
            numbers = rounds * self.bank_size + torch.arange(start, min(start + _TILE, rest))
            counts[placed(numbers, self.bank_size, self.seed)[0]] += 1
        return {_BANK: torch.zeros(self.bank_size), _COUNTS: counts}

    def initial(
        self, sites: Sequence[Site], generator: torch.Generator, base: BaseWeights
    ) -> dict[str, dict[str, Tensor]]:
        """The number of each map's first entry."""
        sizes = torch.tensor([0] + [site.in_features * site.out_features for site in sites])
        return {site.path: {_FIRST: first.clone()} for site, first in zip(sites, sizes.cumsum(0), strict=False)}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A function of the weight."""
        bank, first = parameters[_BANK], parameters[_FIRST]
        bank = bank * parameters[_COUNTS].to(bank.dtype).rsqrt()
        return OfWeight(lambda weight: weight + _Dealt.apply(bank, first, weight.shape, self.seed), held=bank.nbytes)


class _Dealt(torch.autograd.Function):
    """The update of one map ``[out, in]`` from the scaled bank ``[D]``. In the backward pass, too, indices are computed
    tile by tile: autograd would keep all of them.
    """

    @staticmethod
    def forward(ctx: Any, bank: Tensor, first: Tensor, shape: torch.Size, seed: int) -> Tensor:
        ctx.save_for_backward(first)
        ctx.size, ctx.seed = len(bank), seed
        update = bank.new_empty(shape.numel())
        for tile in _tiles(update):
            index, sign = placed(first + _numbers(tile, bank), len(bank), seed)
            update[tile] = bank[index] * sign
        return update.view(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (first,), grad = ctx.saved_tensors, grads[0].flatten()
        found = grad.new_zeros(ctx.size)
        for tile in _tiles(grad):
            index, sign = placed(first + _numbers(tile, grad), ctx.size, ctx.seed)
            found.index_add_(0, index, grad[tile] * sign)
        return found, None, None, None


def placed(numbers: Tensor, bank_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Where in the bank entries stand, and their signs; version 1.

    Entry n is the (n mod D)-th of round ⌊n / D⌋. Within a round places are a bijection of [0, D): adding a key of the
    round, multiplying by an odd number, and mixing high bits into low ones, each modulo D, three times over.

    Args:
        numbers: of entries, int64.
        bank_size: D, a power of two.
        seed: below 2³².

    Returns:
        Indices, int64, and signs, −1 or 1, int64, in the shape of ``numbers``.
    """
    bits = bank_size.bit_length() - 1
    mask, shift = bank_size - 1, max(bits // 2, 1)
    rounds = numbers >> bits
    key = _mixed(_mixed((rounds & _WORD) ^ seed) + (rounds >> 32))
    place = numbers & mask
    for multiplier in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D):
        place = ((place + key) * multiplier) & mask
        place = place ^ (place >> shift)
        key = _mixed(key + multiplier)
    sign = _mixed(place + key) & 1
    return place, 1 - 2 * sign


def _mixed(word: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit depends on every other (Murmur3's finaliser, Appleby 2011)."""
    word = word & _WORD
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)


def _entries(sites: Sequence[Site]) -> int:
    return sum(site.in_features * site.out_features for site in sites)


def _tiles(flat: Tensor) -> Iterator[slice]:
    for start in in_steps(len(flat), _TILE):
        yield slice(start, min(start + _TILE, len(flat)))


def _numbers(tile: slice, like: Tensor) -> Tensor:
    return torch.arange(tile.start, tile.stop, device=like.device)
