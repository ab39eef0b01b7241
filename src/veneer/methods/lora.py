"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, §4.1).

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ,     s = α / r, or α / √r when rank-stabilised (Kalajdzievski 2023)

A is Kaiming-uniform(√5), as in the authors' code; B is zero, so the adapted model starts out bit-equal to the
base. Trained and stored: r · (in + out) numbers a site, in a stack of experts as many for each. With `bias`, B has
one: y += s · b. Merges into the weight. With `freeze_a` only B is trained (LoRA-FA, Zhang et al. 2023,
arXiv:2308.03303). Other starts: `veneer.methods.starts`, and `veneer.methods.eva`, told by the data.

Use it first: it learns well on all linear layers at about ten times full fine-tuning's learning rate, costs
nothing once merged, and every server reads it. Prefer a smaller method where thousands of adapters must be kept
or only some dozen rows are there to learn from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.bases.site import EMBEDDING, EXPERTS
from veneer.deltas import Bias, ConvLowRank, Delta, EmbeddingLowRank, LowRank, Stack
from veneer.errors import AdapterError, AdapterFileError, TargetError, did_you_mean
from veneer.methods.base import BaseWeights, Lowering, State, Survey
from veneer.methods.eva import directions
from veneer.methods.factors import Factors, factors_of
from veneer.methods.starts import MENDING, SHIFTING, STARTS
from veneer.methods.targeted import Targeted

# Settings of peft's LoraConfig that change what is computed; each must be at its default for us to read the file.
_NOT_READ = (
    "layer_replication",
    "use_qalora",
    "trainable_token_indices",
    "alora_invocation_tokens",
)


_A0, _B0 = "lora_A.start", "lora_B.start"


def _convolve(module: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """The module's own convolution (stride, padding and all) with another kernel."""
    return module._conv_forward(x, kernel, None)


class LoRA(Targeted):
    """Low-rank adaptation of linear maps."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank update of linear maps; the one to try first"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"
    learning_rate: ClassVar[float] = 5e-4
    peft_type: ClassVar[str] = "LORA"
    peft_names: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "target_modules": "targets",
        "use_rslora": "rank_stabilized",
        "lora_bias": "bias",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    }
    peft_checked: ClassVar[frozenset[str]] = frozenset({"target_parameters", "use_dora"})
    kinds: ClassVar[Collection[str]] = ("linear", EMBEDDING, "conv", EXPERTS)

    rank: int = Field(16, ge=1)
    """Rank r of the update."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of zeroing an input feature of A in training."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead, so that large ranks learn as fast."""
    bias: bool = False
    """Give B a bias."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq"] = "kaiming"
    """What the factors start from; all but kaiming are for linear maps. EVA's are told by the training data;
    loftq is for a quantised base."""
    rho: float = Field(2.0, ge=1)
    """With init: eva, a map may get up to so many times its rank, as others get less; 1 leaves ranks as they are."""
    examples: int = Field(64, ge=1)
    """With init: eva, how many rows of the training data are looked at."""
    freeze_a: bool = False
    """Train B only (LoRA-FA): half the optimiser's memory, and fewer activations kept."""
    b_rate: float = Field(1.0, gt=0)
    """B's learning rate over A's (LoRA+, Hayou et al. 2024, arXiv:2402.12354: about 16, with a lower rate for A:
    with the default one MiniLM learned nothing, with a fifth of it it did)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Other ranks for some of the targets, by the words that pick them: {down: 64, "/layers.0./": 4}; the first that
    picks a map counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other values of alpha, likewise."""

    def rank_at(self, site: Site) -> int:
        """Its rank at a site."""
        return next((rank for word, rank in self.rank_pattern.items() if site.answers_to(word)), self.rank)

    def scale_at(self, site: Site) -> float:
        """The factor s of the update at a site."""
        rank = self.rank_at(site)
        return self._alpha_at(site) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def _alpha_at(self, site: Site) -> float:
        return next((alpha for word, alpha in self.alpha_pattern.items() if site.answers_to(word)), self.alpha)

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The maps that `targets` pick.

        Raises:
            TargetError: a rank is more than any of its maps can have; a pattern picks none of the maps; dropout or a
                bias is asked for where there can be none.
        """
        found = super().sites(sites)
        for rank in {self.rank_at(site) for site in found}:
            most = max(
                min(site.in_features * math.prod(site.kernel), site.out_features)
                for site in found
                if self.rank_at(site) == rank
            )
            if rank > most:
                raise TargetError(f"rank {rank} is more than these maps can have, which is {most}; LoRA uses 4 to 128.")
        for word in (*self.rank_pattern, *self.alpha_pattern):
            if not any(site.answers_to(word) for site in found):
                words = {
                    word for site in found for word in (site.role, site.group, site.path.rpartition(".")[2]) if word
                }
                raise TargetError(f"The pattern {word!r} picks none of the targets.{did_you_mean(word, words)}")
        bare = [site.path for site in found if site.parameter is not None]
        if self.dropout and bare:
            raise TargetError(
                f"dropout acts on a map's input, and {bare[0]} has none to itself; leave it out, or dropout."
            )
        if self.bias and (odd := [site for site in found if site.kind != "linear" or site.parameter is not None]):
            raise TargetError(f"bias is for linear maps, and {odd[0].path} is no module of that kind; leave it out.")
        if self.init != "kaiming" and (odd := [site for site in found if site.kind != "linear"]):
            raise TargetError(f"init: {self.init} is for linear maps, and {odd[0].path} is of kind {odd[0].kind}.")
        if self.init == "eva" and bare:
            raise TargetError(f"init: eva looks at a map's input, and {bare[0]} has none to itself; leave it out.")
        if self.init == "orthogonal" and (uneven := [site for site in found if self.rank_at(site) % 2]):
            raise TargetError(
                f"init: orthogonal needs an even rank, and {uneven[0].path} has {self.rank_at(uneven[0])}."
            )
        return found

    def rate(self, name: str) -> float:
        """B's is its own."""
        return self.b_rate if name == "lora_B.weight" else 1.0

    def fixed(self) -> Collection[str]:
        """What the factors started from, where they don't cancel; and A, if it is frozen."""
        return (*((_A0, _B0) if self.init in SHIFTING else ()), *(("lora_A.weight",) if self.freeze_a else ()))

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """``A [r, in, *kernel]`` Kaiming-uniform, ``B [out, r]`` zero; for embeddings the other way round.

        Of experts as peft has it: A is ``[experts · r, in]``, expert by expert; B ``[out, r · experts]``, rank by rank.
        """
        rank = self.rank_at(site)
        if site.kind == EMBEDDING:
            b = torch.randn(site.out_features, rank, generator=generator)
            return {"lora_embedding_A": torch.zeros(rank, site.in_features), "lora_embedding_B": b}
        if self.init not in ("kaiming", "eva"):
            return self._started(site, generator, base)
        rows = rank * (site.count or 1)
        bound = 1 / math.sqrt(site.in_features * math.prod(site.kernel))  # what kaiming_uniform_(a=√5) comes to
        a = torch.empty(rows, site.in_features, *site.kernel).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(site.out_features, rows, *[1] * len(site.kernel))
        bias = {"lora_B.bias": torch.zeros(site.out_features)} if self.bias else {}
        return {"lora_A.weight": a, "lora_B.weight": b, **bias}

    def surveys(self) -> bool:
        """For EVA."""
        return self.init == "eva"

    def surveyed(
        self,
        sites: Sequence[Site],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
        survey: Survey,
    ) -> State:
        """A from the inputs' leading directions, ranks by how much they explain, scales as they were."""
        wanted = {site.path: self.rank_at(site) for site in sites}
        found = directions(survey.inputs(sites, self.examples), wanted, self.rho)
        new, alphas = {path: dict(values) for path, values in parameters.items()}, {}
        for site in sites:
            if (a := found.get(site.path)) is not None:  # else nothing came by here
                b = torch.zeros(site.out_features, len(a), device=a.device)
                new[site.path] |= {"lora_A.weight": a, "lora_B.weight": b}
                wanted[site.path] = len(a)
            rank = wanted[site.path]
            alphas[site.path] = self.scale_at(site) * (math.sqrt(rank) if self.rank_stabilized else rank)
        patterns = {
            "rank_pattern": {path: rank for path, rank in wanted.items() if rank != self.rank},
            "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != self.alpha},
        }
        return self.model_copy(update=patterns), new, shared

    def _started(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """The factors of another start than the usual one, on the base's device, where decomposing is fast."""
        rank = self.rank_at(site)
        if base.loading:
            a, b = torch.zeros(rank, site.in_features), torch.zeros(site.out_features, rank)
        else:
            weight = base.parameters(site)["weight"].detach()
            if self.init in MENDING:
                weight = base.original(site)["weight"].detach().to(weight.device, torch.float32) - weight
            a, b = STARTS[self.init](rank, weight, self.scale_at(site), generator)
        start = {_A0: a.clone(), _B0: b.clone()} if self.init in SHIFTING else {}
        bias = {"lora_B.bias": torch.zeros(site.out_features)} if self.bias else {}
        return {"lora_A.weight": a, "lora_B.weight": b, **bias, **start}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """One low-rank delta, and the bias after it."""
        scale, dropout = self.scale_at(site), self.dropout if step.training else 0.0
        if site.kind == EMBEDDING:
            return EmbeddingLowRank(parameters["lora_embedding_A"], parameters["lora_embedding_B"], scale)
        a, b = parameters["lora_A.weight"], parameters["lora_B.weight"]
        if _A0 in parameters:
            a, b = torch.cat([a, parameters[_A0]]), torch.cat([b, -parameters[_B0]], 1)
        if site.kind == EXPERTS:
            return LowRank(a.unflatten(0, (site.count, -1)), b.unflatten(1, (-1, site.count)).permute(2, 0, 1), scale)
        if site.kind == "conv":
            convolution = step.model.get_submodule(site.path)
            delta: LowRank = ConvLowRank(a, b, scale, dropout, convolve=partial(_convolve, convolution))
        else:
            delta = LowRank(a, b, scale, dropout)
        return Stack((delta, Bias(parameters["lora_B.bias"] * scale))) if self.bias else delta

    @classmethod
    def of_deltas(
        cls, deltas: Mapping[Site, tuple[Delta, Mapping[str, Tensor]]], rank: int | None
    ) -> tuple[Self, Mapping[str, Mapping[str, Tensor]], Mapping[str, float]]:
        """Of a rank for each map; alpha equals it, so that the scale is one."""
        found: dict[str, Factors] = {}
        for site, (delta, parameters) in deltas.items():
            if site.kind != "linear":
                raise AdapterError(
                    f"{site.path} is of kind {site.kind}; only changes of linear maps can be written so."
                )
            try:
                found[site.path] = factors_of(delta, parameters, rank)
            except AdapterError as error:
                raise AdapterError(f"{site.path} can't be written as {cls.name}: {error}") from error
        ranks = {path: len(factors.a) for path, factors in found.items()}
        usual = max(ranks.values(), key=list(ranks.values()).count)
        odd = {path: own for path, own in ranks.items() if own != usual}
        method = cls(rank=usual, alpha=usual, targets=tuple(found), rank_pattern=odd, alpha_pattern=odd)
        values = {path: {"lora_A.weight": each.a, "lora_B.weight": each.b} for path, each in found.items()}
        return method, values, {path: each.error for path, each in found.items()}

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With the settings of peft's that are fixed here, and patterns in its regular expressions."""
        fields = super().to_peft([site for site in sites if site.kind != EXPERTS], site_map)
        if experts := [site for site in sites if site.kind == EXPERTS]:
            fields["target_parameters"] = site_map.shortest_names(experts)
        for ours, at in (("rank_pattern", self.rank_at), ("alpha_pattern", self._alpha_at)):
            values = {at(site): [other for other in sites if at(other) == at(site)] for site in sites}
            values.pop(self.rank if ours == "rank_pattern" else self.alpha, None)
            fields[ours] = {
                re.escape(name): value for value, mine in values.items() for name in site_map.shortest_names(mine)
            }
        if self.init in SHIFTING:
            fields["peft_type"] = "VENEER_LORA"  # peft keeps no start beside the factors
        ours_alone = ("init", "rho", "examples", "freeze_a", "b_rate")  # of how it is trained, not of what it does
        fields = {key: value for key, value in fields.items() if key not in ours_alone}
        return fields | {"bias": "none", "init_lora_weights": True}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Without the flag that makes it DoRA's."""
        return super().reads(config) and not config.get("use_dora")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses settings that would change the result: DoRA, trained biases of the base and the like."""
        odd = [key for key in _NOT_READ if config.get(key)]
        odd += ["bias"] if config.get("bias", "none") != "none" else []
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
            odd.append(f"init_lora_weights={start!r} (which changed the base)")
        if odd:
            raise AdapterFileError(f"This LoRA adapter uses {', '.join(odd)}, which veneer does not read yet.")
        patterns = {
            name: {f"/(^|\\.)({key})$/": value for key, value in (config.get(name) or {}).items()}
            for name in ("rank_pattern", "alpha_pattern")
        }
        modules, parameters = config.get("target_modules") or (), config.get("target_parameters") or ()
        targets = modules if isinstance(modules, str) and not parameters else [*modules, *parameters]
        return super().from_peft({**config, **patterns, "target_modules": targets})
