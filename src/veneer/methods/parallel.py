"""Parallel adapters, plain and scaled (He et al. 2022, arXiv:2110.04366, §4.4 and table 6).

    h ← FFN(x) + s · (W_u relu(W_d x + b_d) + b_u)

beside the feed-forward branch: x is its input, the sum is made before the residual is added. Trained and stored:
``m (d_in + d_out) + m + d_out`` a layer. As in the paper m = 512 and s = 4 (s = 1 is the plain parallel adapter), W_d
starts Kaiming-uniform and W_u at zero, so that the adapted model is bit-equal to the base. Not mergeable.

Use it for generation and translation, where the paper found it ahead of sequential adapters and of LoRA at the same
size; for small budgets lower the width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from veneer.bases import Site
from veneer.deltas import Beside, Bottleneck, Delta
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.houlsby import ACTIVATIONS
from veneer.methods.pfeiffer import Pfeiffer


class Parallel(Pfeiffer):
    """A bottleneck beside each feed-forward branch."""

    name: ClassVar[str] = "parallel"
    summary: ClassVar[str] = "bottleneck adapters beside the feed-forward, reading its input"
    paper: ClassVar[str] = "He et al. 2022, arXiv:2110.04366"
    learning_rate: ClassVar[float] = 3e-4
    peft_type: ClassVar[str] = "VENEER_PARALLEL"

    bottleneck: int | None = Field(512, ge=1)
    """Width m; null: the layer's divided by `reduction`."""
    scale: float = Field(4.0, gt=0)
    """The factor s of what is added."""

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Down Kaiming-uniform, up zero, biases zero."""
        m = self.width(site)
        down = torch.empty(m, site.in_features)
        return {
            "adapter_down.weight": nn.init.kaiming_uniform_(down, math.sqrt(5), generator=generator),
            "adapter_down.bias": torch.zeros(m),
            "adapter_up.weight": torch.zeros(site.out_features, m),
            "adapter_up.bias": torch.zeros(site.out_features),
        }

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """One parallel bottleneck, on the input of the branch."""
        delta = Bottleneck(
            parameters["adapter_down.weight"],
            parameters["adapter_down.bias"],
            parameters["adapter_up.weight"],
            parameters["adapter_up.bias"],
            ACTIVATIONS[self.activation],
            self.scale,
            parallel=True,
        )
        return delta if site.source is None else Beside(delta, site.source, step.flow)
