"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190, §4), without the reparametrising network.

    K ← [P_k; K],   V ← [P_v; V]        in every attention layer, P learned

Trained and stored: ``2 · layers · l · key-value width``. Positions: as in peft the prefix takes 0 … l − 1 and the real
tokens start after it, whether positions are learned, rotary or distances (XLNet's prefix alone has no place). In an
encoder-decoder every attention layer gets one, those to the encoder too, unless `where` says to do as peft does. A
layer that is used repeatedly (ALBERT's) has one prefix for all its uses. Not mergeable, never an identity at the
start: a prefix always draws attention.

Use it to steer generation with a frozen model that must stay shared by many; it learns more slowly than LoRA and
wants a high learning rate. It costs l more keys in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import SiteMap
from veneer.bases.site import AttentionSite
from veneer.deltas import Delta, KeyValues
from veneer.errors import TargetError
from veneer.methods.base import BaseWeights, Lowering, Method


class Prefix(Method):
    """Learned keys and values before those of the input, in every layer."""

    name: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "learned keys and values in every attention layer"
    paper: ClassVar[str] = "Li & Liang 2021, arXiv:2101.00190"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    peft_prefix: ClassVar[str] = "base_model."
    peft_names: ClassVar[Mapping[str, str]] = {"num_virtual_tokens": "length", "where": "where"}

    length: int = Field(20, ge=1)
    """How many keys and values."""
    where: Literal["everywhere", "peft"] = "everywhere"
    """In an encoder-decoder: in every attention layer, or as peft does: in the decoder's attention to itself only,
    layer i of L with the slots 4i and 4i + 1, modulo 2L, of the table (layers share them, half of it is unused)."""
    positions: Literal["after"] = "after"
    """Where the real tokens' positions start: after the prefix."""

    def sites(self, sites: SiteMap) -> Sequence[AttentionSite]:
        """Every attention layer, or those of the decoder."""
        if not sites.attention:
            raise TargetError("This base has no attention layers that veneer knows to add keys and values to.")
        if self.where == "everywhere":
            return sites.attention
        found = [site for site in sites.attention if site.part == "decoder"]
        if not found:
            raise TargetError("where: peft is for encoder-decoders, and this base is none.")
        return [replace(site, index=index) for index, site in enumerate(found)]

    def shared(self, sites: Sequence[Any], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """One table for all layers, as in peft's files: ``[l, layers · 2 · key-value width]``."""
        width = {site.heads * site.head_width for site in sites}
        if len(width) != 1:
            raise TargetError("The attention layers of this base differ in width; one prefix table cannot serve them.")
        return {"prompt_embeddings": torch.randn(self.length, 2 * len(sites) * width.pop(), generator=generator) * 0.1}

    def lower(self, site: AttentionSite, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """Its two slots of the table, keys first."""
        table = parameters["prompt_embeddings"]
        slots = table.view(self.length, -1, site.heads, site.head_width)
        index = 2 * site.index if self.where == "everywhere" else 4 * site.index % slots.shape[1]
        return KeyValues(slots[:, index], slots[:, index + 1])

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """With the sizes peft makes its encoder by; under a type of our own where peft would do something else."""
        width = sites[0].heads * sites[0].head_width
        ours_alone = {"peft_type": "VENEER_PREFIX"} if self.where == "everywhere" and sites[0].part else {}
        return {
            **ours_alone,
            "task_type": site_map.peft_task,  # without which peft would load it and leave it out
            "num_virtual_tokens": self.length,
            "num_layers": len(sites),
            "token_dim": width,
            "num_attention_heads": sites[0].heads,
            "num_transformer_submodules": 1 if self.where == "everywhere" else 2,
            "encoder_hidden_size": width,
            "prefix_projection": False,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Two submodules mean an encoder-decoder."""
        if config.get("num_transformer_submodules") == 2:
            config = {**config, "where": "peft"}
        return super().from_peft(config)
