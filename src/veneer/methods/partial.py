"""Partial fine-tuning: chosen layers or modules are trained in full, the rest of the base is left as it is.

    w ← w + δ        for every parameter w of the modules chosen, δ zero at the start: bit-equal to the base

The old way of fine-tuning only the top of a network (Yosinski et al. 2014, arXiv:1411.1792; of BERT's layers, Lee et
al. 2019, arXiv:1911.03090). Merges. Trained and stored: as many numbers as the modules have.

`targets` picks linear maps, experts, embeddings, convolutions and norms, biases included, in the words of any method's
targets; "everything" is all of them. By default the last layer in full. The output projection is no such module; where
it shares the input embedding's weight, that embedding is trained for the input alone.

Use it as the middle between an adapter and full fine-tuning: a step with the last layers costs little, because nothing
has to flow back below them. With many layers it costs as much as full fine-tuning, and files as large.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from veneer.bases import Site
from veneer.bases.site import EMBEDDING, EXPERTS
from veneer.deltas import Delta, Param
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.targeted import Targeted

EVERYTHING = "everything"


class Partial(Targeted):
    """Chosen modules in full."""

    name: ClassVar[str] = "partial"
    paper: ClassVar[str] = "Yosinski et al. 2014, arXiv:1411.1792"
    summary: ClassVar[str] = "trains chosen layers or modules in full"
    learning_rate: ClassVar[float] = 1e-4
    peft_type: ClassVar[str] = "VENEER_PARTIAL"
    kinds: ClassVar[Collection[str]] = ("linear", EXPERTS, EMBEDDING, "conv", "norm")
    words: ClassVar[Mapping[str, str]] = {EVERYTHING: "/./"}

    targets: str | tuple[str, ...] = EVERYTHING
    """What: everything, or the words of any method's targets (all-linear, attention, q, module names,
    /regular expressions/)."""
    layers: str | None = "-1:"
    """Which layers, as a slice: "-1:" the last, "8:" all from the ninth on; null for all and what is outside them."""

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """δ for each of the module's own parameters, zero."""
        return {f"delta.{name}": torch.zeros(value.shape) for name, value in base.parameters(site).items()}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The sums."""
        return Param({name.removeprefix("delta."): value for name, value in parameters.items()})
