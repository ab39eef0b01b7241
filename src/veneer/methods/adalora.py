"""AdaLoRA: adaptive budgets for LoRA (Zhang et al. 2023, arXiv:2303.10512, §3).

    W ← W + s · B diag(E) A,     s = α / r₀,     E zero at the start: bit-equal to the base

Every map starts with rank r₀. In the course of training the least important triples (E_i, A_i, B_i) of all maps are
put out, their E_i set to zero, until r̄ a map are left on average:

    importance of a number   Ī · Ū,  with Ī the mean of |w · ∂w| and Ū the mean of |·  − Ī|, both with β = 0.85
    importance of a triple   of E_i, plus the means of those of A_i and of B_i
    budget at step t         r̄ + (r₀ − r̄) (1 − (t − t₀) / (T − t₁ − t₀))³ per map, between warm-up t₀ and the last t₁
    penalty                  γ · mean over all A and B of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖, so that triples stay comparable

as in the authors' code (the paper squares the norms). Merges; runs, mixes and exports as plain LoRA. Use it where a
small budget is to be spread over many maps; it needs some hundred steps to tell which matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, LowRank
from veneer.errors import AdapterFileError
from veneer.methods.base import BaseWeights, Course, Lowering
from veneer.methods.targeted import Targeted

_TRIPLE = ("lora_E", "lora_A", "lora_B")


class AdaLoRA(Targeted):
    """Low-rank updates whose ranks are decided by importance."""

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "LoRA that spends its rank where it matters"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv:2303.10512"
    learning_rate: ClassVar[float] = 2e-3
    peft_type: ClassVar[str] = "ADALORA"
    peft_checked: ClassVar[frozenset[str]] = frozenset({"r", "total_step", "tinit", "tfinal", "deltaT", "rank_pattern"})
    peft_names: ClassVar[Mapping[str, str]] = {
        "init_r": "rank",
        "target_r": "target_rank",
        "lora_alpha": "alpha",
        "orth_reg_weight": "orthogonality",
        "target_modules": "targets",
    }

    rank: int = Field(12, ge=1)
    """Rank r₀ every map starts with."""
    target_rank: int = Field(8, ge=1)
    """Rank r̄ a map in the end, on average."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    orthogonality: float = Field(0.1, ge=0)
    """Weight γ of the penalty."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps before ranks are cut."""
    final: float = Field(0.3, ge=0, lt=1)
    """Share of the steps at the end in which they stay as they are."""
    every: int = Field(10, ge=1)
    """Steps from one cut to the next."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank {self.target_rank} is more than rank {self.rank}")
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final leave no steps to cut ranks in")
        return self

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """A ``[r, in]`` and B ``[out, r]`` normal(0.02), E ``[r, 1]`` zero."""
        return {
            "lora_A": torch.randn(self.rank, site.in_features, generator=generator) * 0.02,
            "lora_B": torch.randn(site.out_features, self.rank, generator=generator) * 0.02,
            "lora_E": torch.zeros(self.rank, 1),
        }

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A low-rank delta."""
        scale = self.alpha / (self.rank + 1e-5)  # as peft's, whose files these are
        return LowRank(parameters["lora_A"] * parameters["lora_E"], parameters["lora_B"], scale)

    def course(self, parameters: Mapping[str, Mapping[str, Tensor]], steps: int) -> Course:
        """The allocation of ranks."""
        return Allocation(self, parameters, steps)

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With targets in module names; how ranks are allocated is not told."""
        fields = super().to_peft(sites, site_map)
        fields = {key: value for key, value in fields.items() if key not in ("warmup", "final", "every")}
        return fields | {"r": self.rank, "total_step": 1, "tinit": 0, "tfinal": 0, "lora_dropout": 0.0, "bias": "none"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses files with cut ranks."""
        if config.get("rank_pattern"):
            raise AdapterFileError("This AdaLoRA adapter uses rank_pattern, which veneer does not read.")
        method = super().from_peft({**config, "target_r": min(config.get("target_r", 8), config.get("init_r", 12))})
        if (steps := config.get("total_step") or 0) <= 1:  # what is written where the schedule is not told
            return method
        shares = {"warmup": config.get("tinit", 0) / steps, "final": config.get("tfinal", 0) / steps}
        return cls(**{**dict(method), **shares, "every": config.get("deltaT", 1)})


class Allocation(Course):
    """Sensitivities of all triples, and the cutting of the least important.

    Args:
        method: with its settings.
        parameters: of all sites.
        steps: of the whole training.
    """

    def __init__(self, method: AdaLoRA, parameters: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        self.method, self.sites, self.steps = method, parameters, steps
        self._means = {path: self._zeros(values) for path, values in parameters.items()}
        self._spreads = {path: self._zeros(values) for path, values in parameters.items()}

    @staticmethod
    def _zeros(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(values[name], requires_grad=False) for name in _TRIPLE}

    def penalty(self) -> Tensor | None:
        """Distance of all A and B from orthogonal ones."""
        if not self.method.orthogonality:
            return None
        norms = []
        for values in self.sites.values():
            for rows in (values["lora_A"], values["lora_B"].mT):
                norms.append((rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).norm())
        return self.method.orthogonality * torch.stack(norms).mean()

    def before_step(self, step: int) -> None:
        """Take the gradients into account."""
        if step > self._last:
            return
        for path, values in self.sites.items():
            for name in _TRIPLE:
                gradient = values[name].grad
                if gradient is None:
                    continue
                mean, spread = self._means[path][name], self._spreads[path][name]
                now = (values[name].detach() * gradient).abs()
                mean.lerp_(now, 0.15)
                spread.lerp_((now - mean).abs(), 0.15)

    def after_step(self, step: int) -> None:
        """Put out what is beyond the budget: every few steps, and at each from the last cut on."""
        if step <= self._first or (step < self._last and step % self.method.every):
            return
        scores = {path: self._scores(path) for path in self.sites}
        everything = torch.cat(list(scores.values()))
        kept = self.budget(step)
        if kept >= len(everything):
            return
        least = everything.topk(kept).values[-1]
        with torch.no_grad():
            for path, values in self.sites.items():
                values["lora_E"].masked_fill_((scores[path] < least)[:, None], 0.0)

    def budget(self, step: int) -> int:
        """How many triples of all maps may stay after a step."""
        method, maps = self.method, len(self.sites)
        if step <= self._first:
            return method.rank * maps
        share = max(1 - (step - self._first) / max(self._last - self._first, 1), 0.0)
        return method.target_rank * maps + int((method.rank - method.target_rank) * maps * share**3)

    def state(self) -> dict[str, Tensor]:
        """Both running means."""
        kinds = {"mean": self._means, "spread": self._spreads}
        return {
            f"{kind}.{path}.{name}": value
            for kind, all_of in kinds.items()
            for path, values in all_of.items()
            for name, value in values.items()
        }

    @property
    def _first(self) -> int:
        return int(self.method.warmup * self.steps)

    @property
    def _last(self) -> int:
        return self.steps - int(self.method.final * self.steps)

    def _scores(self, path: str) -> Tensor:
        """``[r]``."""
        of = {name: self._means[path][name] * self._spreads[path][name] for name in _TRIPLE}
        return of["lora_E"].flatten() + of["lora_A"].mean(1) + of["lora_B"].mean(0)
