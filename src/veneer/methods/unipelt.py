"""UniPELT: gated adapters, prefixes and LoRA (Mao et al. 2022, arXiv:2110.07577, §3).

    h ← h + g_A A(h)        P_k, P_v ← g_P P_k, g_P P_v        W x ← W x + g_L (α/r) B A x   g = mean_t σ(w x_t + b)

at every layer, with a gate of its own for each, told by the row's tokens: those of the map's input (LoRA, prefix) or
those the adapter reads. As in the paper a prefix of 10, adapters of width 48 after the feed-forward, LoRA of rank 8 on
queries and values. Padding doesn't count in the means; where attention is causal, g is the mean so far, so that
generation with a cache computes what one forward does. Gates start half open: w normal(0.02), b zero. Trained and
stored: what the three are, and ``d + 1`` a gate. Not mergeable, no identity.

Use it where it isn't known which of the three suits and rows are few; it costs three methods' time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, KeyValues, MeanGate, Opening, Stack
from veneer.errors import TargetError
from veneer.methods.base import Lowering, Method, around_module
from veneer.methods.lora import LoRA
from veneer.methods.mixture import Junction, Mixture, key_of, parameters_of
from veneer.methods.pfeiffer import Pfeiffer
from veneer.methods.prefix import Prefix


@dataclass(frozen=True)
class GatedJunction(Junction):
    """A junction, and what its gates have to know of the module.

    Attributes:
        causal: whether its tokens see only those before them.
        decoder: whether they are a decoder's, beside an encoder's.
        axis: of the rows.
    """

    causal: bool = False
    decoder: bool = False
    axis: int = 0


class UniPELT(Mixture):
    """Adapters, prefixes and LoRA, each behind a gate."""

    name: ClassVar[str] = "unipelt"
    summary: ClassVar[str] = "adapters, prefixes and LoRA, each behind a learned gate"
    paper: ClassVar[str] = "Mao et al. 2022, arXiv:2110.07577"
    peft_type: ClassVar[str] = "VENEER_UNIPELT"

    rank: int = Field(8, ge=1)
    """Of LoRA."""
    length: int = Field(10, ge=1)
    """How many keys and values the prefix has."""
    bottleneck: int = Field(48, ge=1)
    """Width m of the adapters."""

    def members(self) -> Sequence[Method]:
        """The three."""
        return _members(self.rank, self.length, self.bottleneck)

    def sites(self, sites: SiteMap) -> Sequence[GatedJunction]:
        """Those of the three; LoRA on queries and values of attention within a sequence, or on maps that hold both.

        Raises:
            TargetError: prefixes can't be gated here.
        """
        if odd := next((at.path for at in sites.attention if at.path in sites.splits), None):
            raise TargetError(
                f"unipelt gates prefixes row by row, which {odd}, an attention of its own kind, can't do."
            )
        return [
            GatedJunction(
                junction.path,
                junction.members,
                sites.is_causal(junction.path),
                sites.in_decoder(junction.path),
                sites.row_axis(junction.path),
            )
            for junction in super().sites(sites)
            if not _is_other_map(junction.members[0][1], sites)
        ]

    def own(self, site: Junction, generator: torch.Generator) -> dict[str, Tensor]:
        """A gate for each of the three."""
        own: dict[str, Tensor] = {}
        for index, member in site.members:
            width = member.in_features if isinstance(member, Site) else member.width
            own[key_of(index, "gate.weight")] = torch.randn(width, generator=generator) * 0.02
            own[key_of(index, "gate.bias")] = torch.zeros(())
        return own

    def lower(self, site: Junction, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """One after the other, each behind its gate."""
        assert isinstance(site, GatedJunction)
        deltas: list[Delta] = []
        for index, member in site.members:
            own = parameters_of(index, parameters)
            opening = Opening(
                own["gate.weight"], own["gate.bias"], step.flow, (site.path, index, id(own["gate.weight"])),
                site.causal, site.decoder, site.axis,
            )  # fmt: skip
            delta = around_module(member, self.members()[index].lower(member, own, step))
            if isinstance(delta, KeyValues):
                deltas.append(replace(delta, opening=opening, source=member.source))
            else:
                deltas.append(MeanGate(delta, opening, of_output=member.kind == "branch"))
        return Stack(deltas) if len(deltas) > 1 else deltas[0]

    def settled(self, *_: Any) -> None:
        """As it is: a mix has no gates."""
        return


@functools.cache  # asked for at every site in every step
def _members(rank: int, length: int, bottleneck: int) -> tuple[Method, ...]:
    lora = LoRA(rank=rank, alpha=2 * rank, targets="attention")
    return lora, Prefix(length=length), Pfeiffer(bottleneck=bottleneck)


def _is_other_map(site: Any, sites: SiteMap) -> bool:
    """Whether LoRA is not to act there."""
    is_map = isinstance(site, Site) and site.group == "attention"
    return is_map and (site.role not in ("q", "v", "qkv") or sites.is_cross_attention(site.path))
