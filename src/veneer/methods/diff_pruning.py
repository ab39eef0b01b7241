"""Diff pruning (Guo et al. 2021, arXiv:2012.07463, §3).

    θ ← θ + δ,     δ = z ⊙ z_g · w,     w zero at the start: bit-equal to the base

Gates z, one for each number, and z_g, one for each weight or bias (the structured variant), are hard concrete
(Louizos et al. 2018):

    s = σ(log u − log(1 − u) + α),  u ~ U(0, 1);     z = clamp(s (r − l) + l, 0, 1),     l = −1.5, r = 1.5

w and α are learned under a penalty λ E‖δ‖₀ = λ Σ σ(α − log(−l/r)) σ(α_g − log(−l/r)). After the first part of the
steps the gates are drawn once more, the t % of all numbers with the greatest |δ| are kept, and the others are zero from
then on, whatever weight decay or the optimiser's momentum do; the second part trains those kept. In the end they alone
are stored: numbers, rows and columns. Out of training gates are σ(α) (r − l) + l, clamped. Merges.

Trained: twice the numbers of the targeted maps, weights and biases, and one more for each of them; after that, t % of
them. As in the paper: λ = 1.25e-7, α = 5 at the start, t = 0.5. There both parts are runs of their own, on all
parameters; here shares of one run, on linear maps (`targets`), and α learns at a higher rate than w, without which it
would hardly move in a short run.

Use it where what is stored per task must be tiny, and compute and memory in training don't matter: it takes more of
both than full fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site
from veneer.deltas import Bias, Delta, Param, Sparse, Stack
from veneer.methods.base import BaseWeights, Course, Lowering, State
from veneer.methods.entries import INDICES, VALUES, entries, fault, greatest, matrix_fault
from veneer.methods.targeted import Targeted

LOW, HIGH = -1.5, 1.5
"""l and r, what the gates are stretched to."""
OPEN = 1e4
"""An α at which a gate is one whatever is drawn; at its negative, zero."""
_BIAS_VALUES, _BIAS_INDICES = "sparse_bias_values", "sparse_bias_indices"
_ALPHA, _GROUP = ".alpha", ".alpha_group"


class DiffPruning(Targeted):
    """A sparse difference, found by learning which numbers to leave alone."""

    name: ClassVar[str] = "diff-pruning"
    paper: ClassVar[str] = "Guo et al. 2021, arXiv:2012.07463"
    summary: ClassVar[str] = "learns a sparse difference to the base; tiny files, costly training"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "VENEER_DIFF_PRUNING"
    outcomes: ClassVar[frozenset[str]] = frozenset({"pruned"})

    density: float = Field(0.005, gt=0, le=1)
    """Share of the numbers that may differ from the base's in the end."""
    penalty: float = Field(1.25e-7, ge=0)
    """Weight λ of the expected count of differing numbers."""
    alpha: float = 5.0
    """What α starts from."""
    alpha_rate: float = Field(100.0, gt=0)
    """α's learning rate over w's."""
    structured: bool = True
    """Gate weights and biases as wholes, too."""
    first_phase: float = Field(0.5, gt=0, lt=1)
    """Share of the steps before the numbers to keep are chosen."""
    pruned: bool = False
    """Hold the numbers kept, and nothing else: what a training ends with."""

    def rate(self, name: str) -> float:
        """α's is its own."""
        return self.alpha_rate if _ALPHA in name else 1.0

    def sized(self) -> Collection[str]:
        """Those of what is left: how much that is of a map was decided in training."""
        return (VALUES, INDICES, _BIAS_VALUES, _BIAS_INDICES) if self.pruned else ()

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """For weight and bias: w, zero, and α in their shape, α of the group ``[]``; once pruned, no entries yet."""
        own = base.parameters(site)
        if self.pruned:
            return {name: value for part in own for name, value in _kept(part, torch.empty(0, 1), _none()).items()}
        values: dict[str, Tensor] = {}
        for name, value in own.items():
            values |= {name: torch.zeros(value.shape), name + _ALPHA: torch.full(value.shape, self.alpha)}
            if self.structured:
                values[name + _GROUP] = torch.tensor(self.alpha)
        return values

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """δ, drawn anew for each step of training; once pruned, the entries."""
        if not self.pruned:
            return Param({name: self.difference(name, parameters, step.training) for name in _parts(parameters)})
        rows, columns = parameters[INDICES]
        delta = Sparse(rows, columns, parameters[VALUES])
        if _BIAS_VALUES not in parameters:
            return delta
        values = parameters[_BIAS_VALUES]
        bias = torch.zeros(site.out_features, dtype=values.dtype, device=values.device)
        return Stack((delta, Bias(bias.index_put((parameters[_BIAS_INDICES].long(),), values))))

    def fault(self, site: Site, parameters: Mapping[str, Tensor]) -> str | None:
        """Indices must lie in the weight and the bias."""
        if not self.pruned:
            return None
        found = matrix_fault(parameters[VALUES], parameters[INDICES], site.out_features, site.in_features)
        if found or _BIAS_VALUES not in parameters:
            return found
        return fault(parameters[_BIAS_VALUES], (parameters[_BIAS_INDICES], site.out_features))

    def difference(self, name: str, parameters: Mapping[str, Tensor], drawn: bool) -> Tensor:
        """δ of a weight or bias, with gates drawn by the global random state, or as they are out of training."""
        delta = gate(parameters[name + _ALPHA], drawn) * parameters[name]
        return delta * gate(parameters[name + _GROUP], drawn) if self.structured else delta

    def course(self, parameters: Mapping[str, Mapping[str, Tensor]], steps: int) -> Course | None:
        """Two phases; what is pruned already is simply trained."""
        return None if self.pruned else Pruning(self, parameters, steps)

    def settled(
        self,
        sites: Sequence[Site],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> State | None:
        """The numbers kept. Of a training that ended before they were chosen, those with the greatest |δ|."""
        if self.pruned:
            return None
        deltas = {
            (path, name): self.difference(name, values, drawn=False)
            for path, values in parameters.items()
            for name in _parts(values)
        }
        chosen = self.chosen(deltas)
        found: dict[str, dict[str, Tensor]] = {path: {} for path in parameters}
        for (path, name), delta in deltas.items():
            found[path] |= _kept(name, delta, chosen[path, name])
        return self.model_copy(update={"pruned": True}), found, shared

    def chosen(self, deltas: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
        """Indices of the numbers to keep, by where they are."""
        total = sum(delta.numel() for delta in deltas.values())
        scores = {f"{path}\0{name}": delta.detach().abs() for (path, name), delta in deltas.items()}
        best = greatest(scores, max(round(self.density * total), 1))
        return {key: best["\0".join(key)] for key in deltas}


class Pruning(Course):
    """The penalty, the choice, and its being kept to.

    Args:
        method: with its settings.
        parameters: of all sites.
        steps: of the whole training.
    """

    def __init__(self, method: DiffPruning, parameters: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        self.method, self.sites = method, parameters
        self.chooses_at = max(round(method.first_phase * steps), 1)
        self._chosen = torch.zeros(1, dtype=torch.bool)

    def penalty(self) -> Tensor | None:
        """λ times the expected count of differing numbers; nothing once they are chosen."""
        return None if self._chosen else self.method.penalty * self.expected_count()

    def expected_count(self) -> Tensor:
        """E‖δ‖₀ where no w is zero."""
        counts = []
        for values in self.sites.values():
            for name in _parts(values):
                count = opening(values[name + _ALPHA]).sum()
                counts.append(count * opening(values[name + _GROUP]) if self.method.structured else count)
        return torch.stack(counts).sum()

    def after_step(self, step: int) -> None:
        """At the end of the first phase choose; from then on hold to it."""
        with torch.no_grad():
            if not self._chosen and step >= self.chooses_at:
                self._choose()
            if self._chosen:
                self._hold()

    def final_from(self) -> int:
        """The first step of the second phase."""
        return self.chooses_at

    def state(self) -> dict[str, Tensor]:
        """Whether they are chosen."""
        return {"chosen": self._chosen}

    def _choose(self) -> None:
        """Draw the gates a last time; open those of what is kept for good, and close the others."""
        deltas = {
            (path, name): self.method.difference(name, values, drawn=True)
            for path, values in self.sites.items()
            for name in _parts(values)
        }
        for (path, name), kept in self.method.chosen(deltas).items():
            values = self.sites[path]
            values[name].copy_(deltas[path, name])
            values[name + _ALPHA].fill_(-OPEN).view(-1)[kept] = OPEN
            if self.method.structured:
                values[name + _GROUP].fill_(OPEN)
        self._chosen.fill_(True)

    def _hold(self) -> None:
        """Undo what the optimiser's momentum and decay did to gates and to what is not kept."""
        for values in self.sites.values():
            for name in _parts(values):
                alpha = values[name + _ALPHA]
                alpha.copy_(alpha.sign() * OPEN)
                values[name].mul_(alpha > 0)
                if self.method.structured:
                    values[name + _GROUP].fill_(OPEN)


def gate(alpha: Tensor, drawn: bool) -> Tensor:
    """z for each α: drawn, or as it is out of training."""
    noise: Tensor | float = 0.0
    if drawn:
        u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
        noise = u.log() - (-u).log1p()
    return ((alpha + noise).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def opening(alpha: Tensor) -> Tensor:
    """P(z > 0) for each α."""
    return (alpha - math.log(-LOW / HIGH)).sigmoid()


def _parts(values: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights and biases among a site's parameters."""
    return [name for name in values if "." not in name]


def _kept(name: str, delta: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """What is stored of a weight or bias."""
    values = delta.detach().flatten()[kept]
    if name == "bias":
        return {_BIAS_VALUES: values, _BIAS_INDICES: kept.to(torch.int32)}
    return entries(kept, delta.shape[-1], values)


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.long)
