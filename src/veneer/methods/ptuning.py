"""P-tuning (Liu et al. 2021, arXiv:2103.10385, §3.2).

    h = MLP(BiLSTM(E))          E ∈ R^{l×d};  MLP = Linear, ReLU, Linear        (encoder: lstm)
    h = MLP(E)                  MLP = Linear, ReLU, Linear, ReLU, Linear        (encoder: mlp, as in NeMo and peft)

h_1 … h_l are embeddings of virtual tokens. They stand before the input, or at slots in it: wherever the text has the
marker. That has to be a special token of the base's tokenizer which its texts don't otherwise have, such as T5's
``<extra_id_0>``, SmolLM2's ``<repo_name>`` or BERT's ``[MASK]``: ordinary words would be cut up with their neighbours.

    method: {name: ptuning, length: 8, marker: <extra_id_0>, slots: [3, 2]}
    text:   "<extra_id_0> It was a great film. <extra_id_0> The film is"

Three virtual tokens replace the first marker, two the second, and the remaining three stand before the input. Markers
beyond the slots stay what they are; a row with fewer is an error. The encoder is for training only: what is kept are
the h, as a P-tuning without one.

Stored: l · d. Trained: as many without an encoder; with an LSTM of w units a direction (the paper's w = d/2 by
default) and two layers ``l · d + 8w(d + w + 2) + 8w(3w + 2) + 2w(2w + 1) + d(2w + 1)``; with an MLP of width w (d by
default) ``l · d + w(d + 1) + w(w + 1) + d(w + 1)``. Not mergeable, never an identity.

Use it for tasks put as cloze texts, whose words matter and are hard to choose; it learns more steadily than plain
prompt tuning. It costs l more tokens of context. With data in plenty LoRA reaches further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from veneer.bases import SiteMap
from veneer.bases.site import Site
from veneer.deltas import Delta, Tokens
from veneer.errors import AdapterError, AdapterFileError
from veneer.methods.base import BaseWeights, Lowering, Method
from veneer.methods.networks import run, started
from veneer.methods.virtual import TABLE, VirtualTokens

_MARKER = "slot_marker"
_EMBEDDING, _LSTM, _MLP = (f"prompt_encoder.{name}." for name in ("embedding", "lstm_head", "mlp_head"))


class PTuning(VirtualTokens):
    """Virtual tokens made by a small network, before the input or at slots in it."""

    name: ClassVar[str] = "ptuning"
    paper: ClassVar[str] = "Liu et al. 2021, arXiv:2103.10385"
    summary: ClassVar[str] = "virtual tokens from a small network, anywhere in the input"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "P_TUNING"
    peft_names: ClassVar[Mapping[str, str]] = {
        "num_virtual_tokens": "length",
        "encoder_reparameterization_type": "encoder",
        "encoder_hidden_size": "width",
        "encoder_num_layers": "layers",
    }

    encoder: Literal["lstm", "mlp"] | None = "lstm"
    """What makes the virtual tokens while they are trained; null: nothing, they are trained themselves."""
    width: int | None = Field(None, ge=1)
    """Units of the LSTM a direction, by default half the embeddings' width; or width of the MLP, by default theirs."""
    layers: int = Field(2, ge=1)
    """Of the LSTM."""
    slots: tuple[int, ...] = ()
    """How many virtual tokens replace each marker in the text, in order; those left over stand before the input."""
    marker: str | int | None = None
    """What marks a slot in the text: a special or added token of the base's tokenizer; or a token's id."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if bool(self.slots) != (self.marker is not None):
            raise ValueError("slots and marker go together: how many virtual tokens, and what in the text they replace")
        if any(count < 1 for count in self.slots) or sum(self.slots) > self.length:
            raise ValueError(f"slots are numbers from 1, at most the length of {self.length} together")
        return self

    @property
    def asks(self) -> str | None:
        """Markers, where there are slots."""
        return f"stands at markers {self.marker} in the text, and general texts have none" if self.slots else None

    def shared(self, sites: Sequence[Any], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """The embeddings ``[l, d]`` and the network's parameters; the marker's id where there are slots."""
        d = sites[0].out_features
        if self.encoder is None:
            values = {TABLE: torch.randn(self.length, d, generator=generator) * 0.1}
        else:
            values = {_EMBEDDING + "weight": torch.randn(self.length, d, generator=generator)}
            values |= started(lambda: self._mlp(d), generator, _MLP)
        if self.encoder == "lstm":
            values |= started(lambda: self._lstm(d), generator, _LSTM)
        if self.slots:
            values[_MARKER] = torch.tensor(self._marker(base, sites[0].in_features))
        return values

    def rate(self, name: str) -> float:
        """The virtual tokens themselves want a higher one than a head does, the network a lower one."""
        return 3.0 if name == TABLE else 0.1

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The embeddings, as the network makes them."""
        return Tokens(self._embeddings(parameters), self.slots, parameters.get(_MARKER))

    def settled(
        self,
        sites: Sequence[Any],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]] | None:
        """The embeddings the network made, without it."""
        if self.encoder is None:
            return None
        kept = {_MARKER: shared[_MARKER]} if self.slots else {}
        values = {path: dict(own) for path, own in parameters.items()}
        return self.model_copy(update={"encoder": None}), values, {TABLE: self._embeddings(shared), **kept}

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """Under a type of our own where peft has no such thing: slots; networks in files."""
        own = {"peft_type": "VENEER_PTUNING"} if self.slots or self.encoder else {}
        network = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": sites[0].out_features}
        return {**own, **super().to_peft(sites, site_map), **network}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Files (which are for inference) hold no network."""
        if config.get("inference_mode"):
            return cls(length=config["num_virtual_tokens"], encoder=None)
        kind = config.get("encoder_reparameterization_type") or "MLP"
        kind = str(getattr(kind, "value", kind)).lower()
        if kind == "lstm" and not config.get("encoder_hidden_size"):
            raise AdapterFileError(
                "peft makes P-tuning's LSTM as wide as the base where encoder_hidden_size is left out; give it."
            )
        layers = config.get("encoder_num_layers") or 2
        return cls(
            length=config["num_virtual_tokens"], encoder=kind, width=config.get("encoder_hidden_size"), layers=layers
        )

    def _embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """``[l, d]``."""
        if self.encoder is None:
            return parameters[TABLE]
        x = parameters[_EMBEDDING + "weight"]
        d = x.shape[1]
        if self.encoder == "lstm":
            x = run(lambda: self._lstm(d), parameters, _LSTM, x)
        return run(lambda: self._mlp(d), parameters, _MLP, x)

    def _lstm(self, d: int) -> nn.Module:
        return nn.LSTM(d, self._width(d), num_layers=self.layers, bidirectional=True)

    def _mlp(self, d: int) -> nn.Module:
        w = self._width(d)
        if self.encoder == "lstm":
            return nn.Sequential(nn.Linear(2 * w, 2 * w), nn.ReLU(), nn.Linear(2 * w, d))
        return nn.Sequential(nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d))

    def _width(self, d: int) -> int:
        return self.width or (max(d // 2, 1) if self.encoder == "lstm" else d)

    def _marker(self, base: BaseWeights, vocabulary: int) -> int:
        """The marker's id.

        Raises:
            AdapterError: it is no token that marks anything wherever it stands.
        """
        if base.loading:
            return 0
        tokenizer, marker = base.tokenizer, self.marker
        if isinstance(marker, str):
            if tokenizer is None:
                raise AdapterError(
                    f"ptuning: marker {marker!r} needs a tokenizer, and this base has none; give the token's id."
                )
            known = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
            if marker not in known:
                roles = ("bos", "eos", "unk", "sep", "pad", "cls")  # of which texts have some anyway
                taken = {getattr(tokenizer, f"{role}_token", None) for role in roles}
                fit = ", ".join(token for token in known if token not in taken)
                raise AdapterError(
                    f"ptuning: marker {marker!r} is no special token of this base's tokenizer, as a marker must be: "
                    + (f"one of {fit}. Write it into the texts where a slot is to be." if fit else "it has none spare.")
                )
            marker = known[marker]
        assert marker is not None
        if not 0 <= marker < vocabulary:
            raise AdapterError(f"ptuning: marker {marker} is no token: this base has ids 0 to {vocabulary - 1}.")
        if marker == getattr(getattr(base.model, "config", None), "pad_token_id", None):
            raise AdapterError(f"ptuning: marker {self.marker!r} is what rows are padded with; choose another token.")
        return marker
