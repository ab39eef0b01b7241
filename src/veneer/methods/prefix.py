"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190, §4).

    K ← [P_k; K],   V ← [P_v; V]        in every attention layer
    P learned, or with `mlp` (§4.3)     P = W₂ tanh(W₁ E + b₁) + b₂,   E ∈ R^{l×d} and the network learned

d is the key-value width (the paper's model has no other, and peft does so). The network is for training only: what
is kept is P, as a prefix without one.

Stored: ``2 · layers · l · d``. Trained: as many, or with the network ``l · d + (d + 1) m + (m + 1) · 2 · layers · d``
of width m. Positions: as in peft the prefix takes 0 … l − 1 and the real
tokens start after it, whether positions are learned, rotary or distances (XLNet's prefix alone has no place). In an
encoder-decoder every attention layer gets one, those to the encoder too, unless `where` says to do as peft does. A
layer that is used repeatedly (ALBERT's) has one prefix for all its uses. Not mergeable, never an identity at the
start: a prefix always draws attention.

Use it to steer generation with a frozen model that must stay shared by many; it learns more slowly than LoRA and
wants a high learning rate. It costs l more keys in every layer. The network makes training steadier, for generation
above all, at the price of far more numbers while training lasts; leave it out where memory is short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer.bases import SiteMap
from veneer.bases.site import AttentionSite
from veneer.deltas import Delta, KeyValues
from veneer.errors import AdapterFileError, ConfigError, TargetError
from veneer.methods.base import BaseWeights, Lowering, Method
from veneer.methods.networks import started
from veneer.methods.virtual import TABLE

_NETWORK = "prompt_encoder."
_EMBEDDING, _INTO, _OUT = (f"{_NETWORK}{name}" for name in ("embedding.", "transform.0.", "transform.2."))


class Prefix(Method):
    """Learned keys and values before those of the input, in every layer."""

    name: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "learned keys and values in every attention layer"
    paper: ClassVar[str] = "Li & Liang 2021, arXiv:2101.00190"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    peft_prefix: ClassVar[str] = "base_model."
    peft_names: ClassVar[Mapping[str, str]] = {
        "num_virtual_tokens": "length",
        "prefix_projection": "mlp",
        "encoder_hidden_size": "mlp_width",
    }

    length: int = Field(20, ge=1)
    """How many keys and values."""
    where: Literal["everywhere", "peft"] = "everywhere"
    """In an encoder-decoder: in every attention layer, or as peft does: in the decoder's attention to itself only,
    layer i of L with the slots 4i and 4i + 1, modulo 2L, of the table (layers share them, half of it is unused)."""
    mlp: bool = False
    """Whether a network makes the prefix while it is trained."""
    mlp_width: int = Field(512, ge=1)
    """Of the network's hidden layer."""
    positions: Literal["after"] = "after"
    """Where the real tokens' positions start: after the prefix."""

    def check_new(self) -> None:
        """Nor may the width of a network be given where there is none."""
        super().check_new()
        if not self.mlp and self.mlp_width != type(self).model_fields["mlp_width"].default:
            raise ConfigError(
                f"method.mlp_width: is the width of a network, and {self.name} has none without mlp: true. Set that, "
                "or leave mlp_width out."
            )

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
        d, columns = next(iter(width)), 2 * len(sites) * next(iter(width))
        if not self.mlp:
            return {TABLE: torch.randn(self.length, columns, generator=generator) * 0.1}

        def network() -> nn.Module:
            layers = (nn.Linear(d, self.mlp_width), nn.Tanh(), nn.Linear(self.mlp_width, columns))
            return nn.ModuleDict({"embedding": nn.Embedding(self.length, d), "transform": nn.Sequential(*layers)})

        return started(network, generator, _NETWORK)

    def rate(self, name: str) -> float:
        """A network wants a lower one."""
        return 0.01 if self.mlp else 1.0

    def lower(self, site: AttentionSite, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """Its two slots of the table, keys first."""
        d = site.heads * site.head_width
        index = 2 * site.index
        if self.where == "peft":
            columns = parameters[_OUT + "bias"] if self.mlp else parameters[TABLE][0]
            index = 4 * site.index % (len(columns) // d)
        mine = self._table(parameters, slice(index * d, (index + 2) * d))
        keys, values = mine.unflatten(1, (2, site.heads, site.head_width)).unbind(1)
        return KeyValues(keys, values)

    def settled(
        self,
        sites: Sequence[Any],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]] | None:
        """The prefix the network made, without it."""
        if not self.mlp:
            return None
        values = {path: dict(own) for path, own in parameters.items()}
        return self.model_copy(update={"mlp": False}), values, {TABLE: self._table(shared, slice(None))}

    def _table(self, parameters: Mapping[str, Tensor], columns: slice) -> Tensor:
        """These columns of the prefixes of all layers, ``[l, columns]``."""
        if not self.mlp:
            return parameters[TABLE][:, columns]
        embedded, into = parameters[_EMBEDDING + "weight"], parameters[_INTO + "weight"]
        hidden = torch.tanh(F.linear(embedded, into, parameters[_INTO + "bias"]))
        return F.linear(hidden, parameters[_OUT + "weight"][columns], parameters[_OUT + "bias"][columns])

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """With the sizes peft makes its encoder by; under a type of our own where peft would do something else."""
        width = sites[0].heads * sites[0].head_width
        # peft would put it elsewhere; or it reads files without the network only.
        odd = (self.where == "everywhere" and sites[0].part) or self.mlp
        ours_alone = {"peft_type": "VENEER_PREFIX"} if odd else {}
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
        """Two submodules mean an encoder-decoder. Files (which are for inference) hold no network."""
        values: dict[str, Any] = {"length": config["num_virtual_tokens"]}
        if config.get("num_transformer_submodules") == 2:
            values["where"] = "peft"
        if config.get("prefix_projection") and not config.get("inference_mode"):
            if not config.get("encoder_hidden_size"):
                raise AdapterFileError(
                    "peft makes the network of prefix_projection as wide as the base where encoder_hidden_size is left "
                    "out; give it."
                )
            values |= {"mlp": True, "mlp_width": config["encoder_hidden_size"]}
        return cls(**values)
