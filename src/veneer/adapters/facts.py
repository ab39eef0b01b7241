"""What is true of a method, found by trying it with its own settings on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from veneer.adapters.base import Base
from veneer.bases.synthetic import tiny_encoder
from veneer.deltas import AtParameter, Beside, Delta, Stack
from veneer.errors import AdapterError
from veneer.methods import Method


@dataclass(frozen=True)
class Facts:
    """Of a method with its own settings.

    Attributes:
        deltas: the forms it lowers to.
        mergeable: whether it folds into a base's weights, wherever these have a place for it.
        row_mixable: whether each row of a batch can be under it or not.
    """

    deltas: tuple[str, ...]
    mergeable: bool
    row_mixable: bool


def facts(cls: type[Method]) -> Facts | None:
    """What is found of a method; None if it can't be tried without settings of yours, or all is in these."""
    if cls.of_members:
        return None
    try:
        return _tried(cls(**cls.example))
    except Exception:  # a method of another package may do anything, and the others are still to be listed
        return None


def _tried(method: Method) -> Facts:
    tiny = tiny_encoder()
    base = Base(tiny.model, tiny.tokenizer)
    adapter = base.attach(method, "tried").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():  # where it starts, it may do nothing
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.1)
        forms = dict.fromkeys(name for delta in adapter.lower().values() for name in _forms(delta))
        return Facts(tuple(forms), _merges(adapter), _mixes(base))


def _forms(delta: Delta) -> Iterator[str]:
    """The name of a form, and of those it is made of."""
    if not isinstance(delta, Stack | AtParameter | Beside):  # these say in which order and where
        yield type(delta).__name__
    for held in vars(delta).values():
        for part in held if isinstance(held, Sequence) else (held,):
            if isinstance(part, Delta):
                yield from _forms(part)


def _merges(adapter: Any) -> bool:
    try:
        adapter.merged()
    except AdapterError:
        return False
    return True


def _mixes(base: Base) -> bool:
    """Whether a row under it and one without come out of one batch as each does alone."""
    ids = torch.tensor([[4, 5, 6, 7]], device=base.device)
    alone = []
    for name in ("tried", None):
        with base.using(name):
            alone.append(base.model(ids).logits)
    try:
        with base.rows(["tried", None]):
            together = base.model(ids.expand(2, -1)).logits
    except AdapterError:
        return False
    return torch.allclose(together, torch.cat(alone), atol=1e-3)
