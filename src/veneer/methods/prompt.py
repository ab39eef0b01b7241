"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691, §2).

    X ← [E; X]          E ∈ R^{l×d} learned, before the embedded input

Trained and stored: l · d numbers, a few thousand. Not mergeable, never an identity. It starts (§2.2) from

    vocabulary      embeddings of tokens drawn from the vocabulary (all of it; the paper's 5,000 commonest)
    class-labels    embeddings of the labels' words, the mean of their tokens, one a virtual token; the rest as above
    text            embeddings of a text's tokens, repeated or cut to the length (as in peft)
    random          uniform values in ±0.5

The paper finds the first two alike and better than random values; for large bases all are. A text is for telling the
task in words.

Use it where adapters must be a few kilobytes and the base is large; small bases learn little by it. It costs l more
tokens of context and wants a very high learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from veneer.bases import SiteMap
from veneer.bases.site import Site
from veneer.deltas import Delta, Tokens
from veneer.errors import AdapterError
from veneer.methods.base import BaseWeights, Lowering, widened
from veneer.methods.virtual import TABLE, VirtualTokens

_INITS = {"SAMPLE_VOCAB": "vocabulary", "TEXT": "text", "RANDOM": "random"}


class Prompt(VirtualTokens):
    """Learned embeddings before the input."""

    name: ClassVar[str] = "prompt"
    summary: ClassVar[str] = "learned virtual tokens before the input; a few thousand numbers"
    paper: ClassVar[str] = "Lester et al. 2021, arXiv:2104.08691"
    learning_rate: ClassVar[float] = 3e-2
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    peft_names: ClassVar[Mapping[str, str]] = {"num_virtual_tokens": "length", "prompt_tuning_init_text": "text"}
    # Its tokenizer is the base's here.
    peft_checked: ClassVar[frozenset[str]] = frozenset({"prompt_tuning_init", "tokenizer_name_or_path"})

    init: Literal["vocabulary", "class-labels", "text", "random"] = "vocabulary"
    """What they start from: tokens drawn from the vocabulary; the words of the labels; a text; or uniform in ±0.5."""
    text: str | None = None
    """The text to start from, with init: text."""
    labels: tuple[str, ...] = ()
    """The labels to start from, with init: class-labels; left out, those of the adapter's task."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if (self.init == "text") != bool(self.text and self.text.strip()):
            raise ValueError("init: text and the text itself go together, give both or neither")
        if self.labels and self.init != "class-labels":
            raise ValueError("labels are for init: class-labels")
        if len(self.labels) > self.length:
            raise ValueError(_too_many(len(self.labels), self.length))
        return self

    def shared(self, sites: Sequence[Any], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """``[l, d]``."""
        site = sites[0]
        if base.loading:
            return {TABLE: torch.zeros(self.length, site.out_features)}
        if self.init == "random":
            return {TABLE: torch.rand(self.length, site.out_features, generator=generator) - 0.5}
        drawn = torch.randint(site.in_features, (self.length,), generator=generator)
        words = [[token] for token in drawn.tolist()]
        if self.init == "text":
            tokens = self._tokens(str(self.text), base)
            words = [[tokens[place % len(tokens)]] for place in range(self.length)]
        if self.init == "class-labels":
            labels = [self._tokens(label, base) for label in self._labels(base)]
            words = [*labels, *words][: self.length]
        embedding = base.model.get_submodule(site.path)
        device = next(embedding.parameters()).device
        with torch.no_grad():  # its forward, not a call: an adapter in use acts on those; some scale their rows
            rows = [widened(embedding.forward(torch.tensor(ids, device=device))).mean(0) for ids in words]
        return {TABLE: torch.stack(rows).cpu()}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The embeddings."""
        return Tokens(parameters[TABLE])

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """What they started from is not told: peft would want the tokenizer to load them."""
        return {**super().to_peft(sites, site_map), "prompt_tuning_init": "RANDOM"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """With peft's way to start."""
        init = _INITS[getattr(config.get("prompt_tuning_init"), "value", config.get("prompt_tuning_init")) or "RANDOM"]
        text = config.get("prompt_tuning_init_text") if init == "text" else None
        return cls(length=config["num_virtual_tokens"], init=init, text=text)

    def _labels(self, base: BaseWeights) -> Sequence[str]:
        labels = self.labels or tuple(str(label) for label in base.task.get("labels", ()))
        if not labels:
            raise AdapterError(
                "prompt: init: class-labels needs labels, and the adapter has no task that has some; give them: "
                "method.labels=[spam, ham]."
            )
        if len(labels) > self.length:
            raise AdapterError(f"prompt: {_too_many(len(labels), self.length)}.")
        return labels

    def _tokens(self, text: str, base: BaseWeights) -> list[int]:
        if base.tokenizer is None:
            raise AdapterError(
                f"prompt: init: {self.init} needs a tokenizer, and this base has none; use another init."
            )
        ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise AdapterError(f"prompt: {text!r} has no tokens to start from; give a text that has some.")
        return ids


def _too_many(labels: int, length: int) -> str:
    return f"init: class-labels starts a token from each label, and {labels} labels don't fit into a length of {length}"
