"""VB-LoRA: low-rank factors out of a bank of vectors (Li et al. 2024, arXiv:2405.15179, §3).

    W ← W + B A,    each piece of b numbers of A's rows and B's columns   u = Σ_{j ∈ top-k(l)} softmax_top-k(l)_j v_j

with one bank v_1 … v_h for the whole model, and for each piece its own logits l ∈ R^h. Bank uniform(−0.02, 0.02),
logits normal(0.1), both small: nearly the base at the start, but not equal to it. Merges; runs, mixes and exports as
plain LoRA. Trained: ``h · b`` numbers, and ``h · r (in + out) / b`` a map. After training only the choice is kept, as
in the paper: ``k`` small integers and ``k − 1`` numbers a piece, unless `keep` says otherwise.

b is one for all maps and has to divide their widths: here it is the greatest up to `vector_length` that does.

Use it where many adapters are kept and sent around: what is stored is a fraction of LoRA's. Not to save memory in
training, where the logits are about as many as LoRA's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta, LowRank
from veneer.errors import AdapterFileError, TargetError
from veneer.methods.base import BaseWeights, Lowering, Method
from veneer.methods.targeted import Targeted

_BANK = "base_model.vblora_vector_bank"
_A, _B = "vblora_logits_A", "vblora_logits_B"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


class VBLoRA(Targeted):
    """Low-rank updates whose factors are mixed from a shared bank of vectors."""

    name: ClassVar[str] = "vblora"
    summary: ClassVar[str] = "low-rank factors mixed from one bank of vectors; very small to keep"
    paper: ClassVar[str] = "Li et al. 2024, arXiv:2405.15179"
    learning_rate: ClassVar[float] = 8e-3
    peft_type: ClassVar[str] = "VBLORA"
    peft_names: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "num_vectors": "num_vectors",
        "vector_length": "vector_length",
        "topk": "topk",
        "vblora_dropout": "dropout",
        "init_vector_bank_bound": "bank_bound",
        "init_logits_std": "logits_std",
        "save_only_topk_weights": "final",
        "target_modules": "targets",
    }

    rank: int = Field(4, ge=1)
    """Rank r of the updates."""
    num_vectors: int = Field(90, ge=2)
    """Vectors h in the bank; more for larger models (the paper takes 2048 for 7B parameters)."""
    vector_length: int = Field(256, ge=2)
    """Length b of the vectors; where it does not divide all widths, the next smaller one that does."""
    topk: int = Field(2, ge=1)
    """How many vectors k make up a piece."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of zeroing an input feature of A in training."""
    bank_bound: float = Field(0.02, gt=0)
    """The bank starts uniform between minus this and this."""
    logits_std: float = Field(0.1, gt=0)
    """Spread of the logits at the start."""
    keep: Literal["choice", "logits"] = "choice"
    """What is kept after training: the choice of vectors, which is then final, or all logits."""
    final: bool = False
    """Whether the choice is final: what an adapter becomes after training with `keep: choice`. The bank alone is
    trained then."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.topk > self.num_vectors:
            raise ValueError(f"topk {self.topk} is more than num_vectors {self.num_vectors}")
        return self

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The maps that `targets` pick.

        Raises:
            TargetError: no length of vectors divides all their widths.
        """
        found = super().sites(sites)
        if self._length(found) == 1:
            widths = sorted({width for site in found for width in (site.in_features, site.out_features)})
            raise TargetError(
                f"No vector_length from 2 to {self.vector_length} divides all widths of these maps "
                f"({', '.join(map(str, widths[:6]))}); leave some of them out."
            )
        return found

    def _length(self, sites: Sequence[Site]) -> int:
        common = math.gcd(*(width for site in sites for width in (site.in_features, site.out_features)))
        return next(length for length in range(min(self.vector_length, common), 0, -1) if common % length == 0)

    def rate(self, name: str) -> float:
        """The logits take ten times the bank's, as in the paper, whose rates are an eighth of these."""
        return 10.0 if name in (_A, _B) else 1.0

    def fixed(self) -> Collection[str]:
        """The choice, once it is final."""
        return (_A + _WEIGHTS, _B + _WEIGHTS) if self.final else ()

    def shared(self, sites: Sequence[Site], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """The bank ``[h, b]``."""
        bank = torch.empty(self.num_vectors, self._length(sites))
        return {_BANK: bank.uniform_(-self.bank_bound, self.bank_bound, generator=generator)}

    def initial(
        self, sites: Sequence[Site], generator: torch.Generator, base: BaseWeights
    ) -> dict[str, dict[str, Tensor]]:
        """Logits of A ``[r, in/b, h]`` and of B ``[out/b, r, h]``; or what `settled` makes of them."""
        length, values = self._length(sites), {}
        for site in sites:
            shapes = {
                _A: (self.rank, site.in_features // length, self.num_vectors),
                _B: (site.out_features // length, self.rank, self.num_vectors),
            }
            logits = {name: torch.randn(shape, generator=generator) * self.logits_std for name, shape in shapes.items()}
            values[site.path] = self._choice(logits) if self.final else logits
        return values

    def settled(
        self,
        sites: Sequence[Any],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]] | None:
        """Of the logits the k greatest: which they are ``[…, k]``, and the weights of all but the last."""
        if self.final or self.keep == "logits":
            return None
        values = {path: self._choice(logits) for path, logits in parameters.items()}
        return self.model_copy(update={"final": True}), values, dict(shared)

    def _choice(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in peft's files with ``save_only_topk_weights``."""
        small = next(d for d in (torch.uint8, torch.int16, torch.int32) if self.num_vectors <= torch.iinfo(d).max)
        found: dict[str, Tensor] = {}
        for name, value in logits.items():
            top, indices = value.topk(self.topk)
            found |= {name + _INDICES: indices.to(small), name + _WEIGHTS: top.softmax(-1)[..., :-1].contiguous()}
        return found

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """A low-rank delta."""
        a, b = (self._pieces(name, parameters) for name in (_A, _B))
        dropout = self.dropout if step.training else 0.0
        return LowRank(a.flatten(1), b.mT.flatten(0, 1), 1.0, dropout)

    def _pieces(self, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
        """``[…, …, b]``."""
        if self.final:
            most, indices = parameters[name + _WEIGHTS], parameters[name + _INDICES].long()
            weights = torch.cat([most, 1 - most.sum(-1, keepdim=True)], -1)
        else:
            top, indices = parameters[name].topk(self.topk)
            weights = top.softmax(-1)
        return (weights[..., None] * F.embedding(indices, parameters[_BANK])).sum(-2)

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With the length that fits, and what is fixed here."""
        fields = super().to_peft(sites, site_map)
        del fields["keep"]
        return fields | {"vector_length": self._length(sites), "bias": "none", "fan_in_fan_out": False}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses trained biases."""
        if config.get("bias", "none") != "none":
            raise AdapterFileError("This VB-LoRA adapter trains biases of the base, which veneer does not read.")
        method = super().from_peft(config)
        return method if method.final else method.model_copy(update={"keep": "logits"})
