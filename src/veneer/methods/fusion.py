"""AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247, §3).

    o = y + Σ_n softmax_n(q · k_n) v_n,     q = W_q y + b_q,  k_n = W_k z_n + b_k,  v_n = W_v z_n,  z_n = δ_n(y) − y

over N adapters that are trained already and stay as they are, at each place where they act; no 1/√d. Trained: ``3 d² +
2 d`` a place; stored: that and the N adapters, so that the folder is whole. As in the paper W_v starts at the identity
and is pulled to it by an L2 penalty, W_q and W_k start normal(0.02); the adapters' own heads are left behind. Not
mergeable.

Use it where several related tasks have adapters and a new one has few rows. It is large beside them: 1.8 M numbers a
place of width 768.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from veneer.bases import SiteMap
from veneer.deltas import Delta
from veneer.deltas import Fusion as FusionDelta
from veneer.errors import TargetError
from veneer.methods.base import Course, Lowering, Method, State
from veneer.methods.mix import Member
from veneer.methods.mixture import Junction, Mixture, key_of, parameters_of

_OWN = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")


class Fusion(Mixture):
    """Attention over trained adapters."""

    name: ClassVar[str] = "fusion"
    aliases: ClassVar[tuple[str, ...]] = ("adapter-fusion",)
    summary: ClassVar[str] = "attention over several trained adapters, which stay as they are"
    paper: ClassVar[str] = "Pfeiffer et al. 2021, arXiv:2005.00247"
    example: ClassVar[Mapping[str, Any]] = {"methods": ["pfeiffer", "pfeiffer"]}
    learning_rate: ClassVar[float] = 5e-4
    peft_type: ClassVar[str] = "VENEER_FUSION"

    adapters: tuple[str, ...] = ()
    """The trained adapters: folders, or names of adapters attached to the same base."""
    methods: tuple[Member, ...] = ()
    """What they are; told by their folders."""
    pull: float = Field(0.01, ge=0)
    """Weight of the penalty ‖W_v − I‖²."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if max(len(self.adapters), len(self.methods)) < 2:
            raise ValueError("give at least two trained adapters, e.g. adapters: [runs/a, runs/b]")
        places = [Path(name).expanduser().resolve() for name in self.adapters]
        places = [place.parent if place.name == "adapter" else place for place in places]
        if twice := [name for name, place in zip(self.adapters, places, strict=True) if places.count(place) > 1]:
            raise ValueError(f"{' and '.join(dict.fromkeys(twice))} is given more than once; give each adapter once")
        return self

    def members(self) -> Sequence[Method]:
        """What the adapters are."""
        return self.methods

    @property
    def origins(self) -> Sequence[str]:
        """The adapters, until it is known what they are."""
        return () if self.methods else self.adapters

    def over(self, trained: Sequence[Method]) -> Method:
        """Knowing what they are."""
        return Fusion(adapters=self.adapters, methods=trained, pull=self.pull) if trained else self

    def started(
        self,
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
        trained: Sequence[State],
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """With the adapters' own parameters."""
        values = {path: dict(own) for path, own in parameters.items()}
        common = dict(shared)
        for index, (_, theirs, together) in enumerate(trained):
            common |= {key_of(index, name): value for name, value in together.items()}
            for path, own in theirs.items():
                values[path] |= {key_of(index, name): value for name, value in own.items()}
        return values, common

    def sites(self, sites: SiteMap) -> Sequence[Junction]:
        """Where any of the adapters acts.

        Raises:
            TargetError: one acts elsewhere than on the output of a residual branch.
        """
        found = super().sites(sites)
        for index, site in (member for junction in found for member in junction.members):
            if getattr(site, "kind", None) != "branch":
                raise TargetError(
                    "fusion joins adapters on the output of residual branches (houlsby, pfeiffer, parallel …), but "
                    f"{self.methods[index].name} acts at {site.path}."
                )
        return found

    def own(self, site: Junction, generator: torch.Generator) -> dict[str, Tensor]:
        """Queries and keys normal(0.02), the identity for values, biases zero."""
        d = site.members[0][1].out_features
        return {
            "query.weight": torch.randn(d, d, generator=generator) * 0.02,
            "query.bias": torch.zeros(d),
            "key.weight": torch.randn(d, d, generator=generator) * 0.02,
            "key.bias": torch.zeros(d),
            "value.weight": torch.eye(d),
        }

    def fixed(self) -> Container[str]:
        """All of the adapters."""
        return _AllBut(_OWN)

    def lower(self, site: Junction, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """One fusion of the adapters that act here, which are not in training."""
        still = replace(step, training=False)
        deltas = [
            self.methods[index].lower(own, parameters_of(index, parameters), still) for index, own in site.members
        ]
        return FusionDelta(deltas, *(parameters[name] for name in _OWN))

    def rate(self, name: str) -> float:
        """One for all that is trained."""
        return 1.0

    def course(self, parameters: Mapping[str, Mapping[str, Tensor]], steps: int) -> Course | None:
        """The pull to the identity."""
        return _Pull(self.pull, [own["value.weight"] for own in parameters.values()])

    def settled(self, *_: Any) -> None:
        """As it is."""
        return


class _AllBut(Container[str]):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __contains__(self, name: object) -> bool:
        return name not in self.names


class _Pull(Course):
    """``pull · Σ ‖W_v − I‖²``."""

    def __init__(self, pull: float, values: Sequence[Tensor]) -> None:
        self.pull, self.values = pull, values

    def penalty(self) -> Tensor | None:
        off = [(value - torch.eye(len(value), device=value.device)).square().sum() for value in self.values]
        return self.pull * torch.stack(off).sum()
