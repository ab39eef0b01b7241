"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190, §4), without the reparametrising network.

    K ← [P_k; K],   V ← [P_v; V]        in every attention layer, P learned

Trained and stored: ``2 · layers · l · key-value width``. Positions: the real tokens start after the prefix, as in
peft. In an encoder-decoder all attention layers get a prefix, those to the encoder too; in relative position biases
it counts as being at no distance (peft's T5 does otherwise: such files are not exchanged). Not mergeable, never an
identity at the start: a prefix always draws attention.

Use it to steer generation with a frozen model that must stay shared by many; it learns more slowly than LoRA and
wants a high learning rate. It costs l more keys in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from veneer.bases import SiteMap
from veneer.bases.sites import AttentionSite
from veneer.deltas import Delta, KeyValues
from veneer.errors import TargetError
from veneer.methods.base import Lowering, Method


class Prefix(Method):
    """Learned keys and values before those of the input, in every layer."""

    name: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "learned keys and values in every attention layer"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    peft_prefix: ClassVar[str] = "base_model."
    peft_names: ClassVar[Mapping[str, str]] = {"num_virtual_tokens": "length"}

    length: int = Field(20, ge=1)
    """How many keys and values."""

    def sites(self, sites: SiteMap) -> Sequence[AttentionSite]:
        """Every attention layer."""
        if not sites.attention:
            raise TargetError("This base has no attention layers that run through transformers' attention interface.")
        return sites.attention

    def shared(self, sites: Sequence[Any], model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """One table for all layers, as in peft's files: ``[l, layers · 2 · key-value width]``."""
        width = {site.heads * site.head_width for site in sites}
        if len(width) != 1:
            raise TargetError("The attention layers of this base differ in width; one prefix table cannot serve them.")
        return {"prompt_embeddings": torch.randn(self.length, 2 * len(sites) * width.pop(), generator=generator) * 0.1}

    def lower(self, site: AttentionSite, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """Its two slots of the table, keys first."""
        table = parameters["prompt_embeddings"]
        slots = table.view(self.length, -1, site.heads, site.head_width)
        index = 2 * site.index
        return KeyValues(slots[:, index], slots[:, index + 1])

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """With the sizes peft makes its encoder by."""
        width = sites[0].heads * sites[0].head_width
        return {
            "num_virtual_tokens": self.length,
            "num_layers": len(sites),
            "token_dim": width,
            "num_attention_heads": sites[0].heads,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": width,
            "prefix_projection": False,
        }
