"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691, §2).

    X ← [E; X]          E ∈ R^{l×d} learned, before the embedded input

Trained and stored: l · d numbers, the fewest of all. Starts from embeddings of tokens drawn from the vocabulary,
which the paper found better than random values. Not mergeable, never an identity.

Use it where adapters must be a few kilobytes and the base is large; small bases learn little by it. It costs l more
tokens of context and wants a very high learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import SiteMap
from veneer.bases.site import Site
from veneer.deltas import Delta, Tokens
from veneer.methods.base import BaseWeights, Lowering, Method


class Prompt(Method):
    """Learned embeddings before the input."""

    name: ClassVar[str] = "prompt"
    summary: ClassVar[str] = "learned virtual tokens before the input; the fewest numbers"
    paper: ClassVar[str] = "Lester et al. 2021, arXiv:2104.08691"
    learning_rate: ClassVar[float] = 3e-2
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    peft_prefix: ClassVar[str] = "base_model."
    peft_names: ClassVar[Mapping[str, str]] = {"num_virtual_tokens": "length"}
    peft_checked: ClassVar[frozenset[str]] = frozenset({"prompt_tuning_init"})

    length: int = Field(20, ge=1)
    """How many virtual tokens."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """What they start from: tokens drawn from the vocabulary, or uniform in ±0.5."""

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The input embedding."""
        return [sites.input_embedding]

    def shared(self, sites: Sequence[Any], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """``[l, d]``."""
        site = sites[0]
        if self.init == "random":
            values = torch.rand(self.length, site.out_features, generator=generator) - 0.5
        else:
            ids = torch.randint(site.in_features, (self.length,), generator=generator)
            weight = base.model.get_parameter(f"{site.path}.weight").detach()
            values = weight[ids.to(weight.device)].float().cpu()
        return {"prompt_embeddings": values}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The embeddings."""
        return Tokens(parameters["prompt_embeddings"])

    @classmethod
    def read(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """For an encoder-decoder peft keeps a second table as long, and never uses it."""
        length = config.get("num_virtual_tokens")
        return {key: value[:length] if key.endswith("prompt_embeddings") else value for key, value in state.items()}

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """With the sizes peft makes its table by."""
        return {
            "task_type": site_map.peft_task,  # without which peft would load it and leave it out
            "num_virtual_tokens": self.length,
            "token_dim": sites[0].out_features,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """With peft's way to start, where that is one of ours."""
        drawn = config.get("prompt_tuning_init") == "SAMPLE_VOCAB"
        return cls(length=config["num_virtual_tokens"], init="vocabulary" if drawn else "random")
