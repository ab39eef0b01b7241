"""What is left of an encoder's general features under an adapter.

The base of a classifier has no answers of its own to compare with, only features: here the last hidden state, averaged
over a text's tokens, z (base) and z′ (adapted). Two things are asked of them, on texts the adaptation never saw:

    similarity   mean over texts of cos(z − μ, z′ − μ),  μ the mean of z: 1 where nothing changed. What it means for
                 whoever keeps features of the base (an index for search): at low values theirs no longer fit.
    retrieval    each text is cut in two; the share of first halves whose own second half is, by cosine, the nearest of
                 all second halves. What it means: whether the features still tell what a text is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapters import Adapter

_BATCH = 16


@dataclass(frozen=True)
class Kept:
    """A value a text; of `base` and `adapter`, a value a text that has two halves, and none if fewer than two have.

    Attributes:
        similarity: of its features under base and adapter.
        base: 1 where the base's features of its halves belong together, else 0.
        adapter: likewise, the adapter's.
    """

    similarity: list[float]
    base: list[float]
    adapter: list[float]


def kept(adapter: Adapter, texts: Sequence[str], max_length: int) -> Kept:
    """What is left of the features of these texts."""
    pairs = [halves for text in texts if all(halves := _halves(text))]
    firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
    if len(pairs) < 2:  # with nothing to mistake it for, the nearest half says nothing
        firsts = seconds = []
    found = {}
    for name, model in (("base", adapter.base.model), ("adapter", adapter)):
        with torch.no_grad(), adapter.base.using(None):
            found[name] = [_features(model, adapter, each, max_length) for each in (texts, firsts, seconds)]
    centre = found["base"][0].mean(0)
    similarity = F.cosine_similarity(found["base"][0] - centre, found["adapter"][0] - centre, dim=-1)
    return Kept(similarity.tolist(), *(_found(ahead, behind) for _, ahead, behind in found.values()))


def _halves(text: str) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def _features(model: nn.Module, adapter: Adapter, texts: Sequence[str], max_length: int) -> Tensor:
    """``[texts, width]``, float32: the last hidden state averaged over the tokens of each text. Positions that virtual
    tokens take before it are left out."""
    tokenizer, device = adapter.base.tokenizer, adapter.base.device
    found = []
    for start in range(0, len(texts), _BATCH):
        some = list(texts[start : start + _BATCH])
        options = {"truncation": True, "max_length": max_length, "padding": True, "padding_side": "right"}
        batch = tokenizer(some, return_tensors="pt", **options).to(device)
        states = model(**batch, output_hidden_states=True).hidden_states[-1].float()
        mask = batch["attention_mask"][..., None].float()
        states = states[:, states.shape[1] - mask.shape[1] :]
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found).cpu() if found else torch.empty(0, 0)


def _found(firsts: Tensor, seconds: Tensor) -> list[float]:
    if not len(firsts):
        return []
    nearest = (F.normalize(firsts, dim=-1) @ F.normalize(seconds, dim=-1).T).argmax(-1)
    return (nearest == torch.arange(len(firsts))).float().tolist()
