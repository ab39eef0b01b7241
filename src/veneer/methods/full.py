"""Full fine-tuning: every parameter of the base, the baseline every comparison needs.

    f(x; θ)  →  f(x; φ)        φ a copy of θ, in float32, that is trained, equal to the base at the start

There is no delta at any module: the base's own code runs on φ from the first layer to the last, put in place for the
forward and taken out after it, so that a step costs what full fine-tuning costs; a base in bf16 computes in bf16, as
with any method, with φ rounded for each step. Parameters that are tied stay tied. Trained and stored: all numbers of
the base, once in the files, under transformers' own names. Merging is the copy. Rows under it can't share a batch with
other rows: nothing of the base is common to them.

Use it to know what can be reached, and where there is enough data and memory: besides φ, its gradient and AdamW's two
moments are four numbers for each of the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.bases.quantized import kind_of
from veneer.deltas import Delta, Replace
from veneer.errors import TargetError
from veneer.methods.base import BaseWeights, Lowering, Method, widened


class Full(Method):
    """All of the base."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "full fine-tuning: the baseline to compare with"
    learning_rate: ClassVar[float] = 5e-5
    baseline: ClassVar[Literal["whole", "head"] | None] = "whole"
    peft_type: ClassVar[str] = "VENEER_FULL"
    row_mixable: ClassVar[bool] = False

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The model as a whole."""
        return [sites.whole]

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Copies of all parameters, by transformers' names."""
        own = base.parameters(site)
        kinds = {name: kind_of(value) or value.dtype for name, value in own.items()}
        if odd := next((name for name, kind in kinds.items() if not getattr(kind, "is_floating_point", False)), None):
            raise TargetError(f"Full fine-tuning is not for a quantised base: {odd} is {kinds[odd]}.")
        return {name: widened(value.detach()).clone() for name, value in own.items()}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The base runs on these."""
        return Replace(parameters)

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """Nothing to tell: peft has no such method."""
        return {}
