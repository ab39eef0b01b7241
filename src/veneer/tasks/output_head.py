"""The output projection of a language model, run only where it is needed, or not at all.

Memory and time of the vocabulary's product follow the labelled tokens, not all tokens. And where the projection's
output are the model's logits, with nothing more done to them, the loss is computed from the projection's input, a
chunk of positions at a time (`veneer.kernels.cross_entropy`), and the model gets a single position's logits; noughts
once that is known of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.adapters import Adapter
from veneer.kernels.cross_entropy import cross_entropy_sum

_last: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Of each projection seen: whether nothing more is done to its output (some models cap or scale their logits)."""

Random = tuple[Tensor, list[Tensor]]
"""States of the random generators, of the processor and of CUDA devices."""


def output_projection(model: nn.Module) -> nn.Module | None:
    """The base's, of an adapter or a model, wrapped or not."""
    inner = _unwrapped(model)
    inner = inner.base.model if isinstance(inner, Adapter) else inner
    return getattr(inner, "get_output_embeddings", lambda: None)()


def acted_on(head: nn.Module, model: nn.Module) -> bool:
    """Whether an adapter acts at the projection itself (all of the model's parameters replaced do not count)."""
    inner = _unwrapped(model)
    return isinstance(inner, Adapter) and any(inner.base.model.get_submodule(path) is head for path in inner.places)


def loss_at(
    model: nn.Module, run: Callable[[], Any], positions: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Sum of the cross-entropies at some positions, and how many targets have the greatest logit.

    Args:
        model: an adapter or a base's model.
        run: calls it.
        positions: ``[rows, tokens]``, bool.
        targets: ``[n]``, of these positions.

    Returns:
        None where the projection's input does not tell the logits; then the random state is as it was before.
    """
    head = output_projection(model)
    if not isinstance(head, nn.Linear) or acted_on(head, model) or _last.get(head) is False:
        return None
    if torch.is_autocast_enabled(head.weight.device.type):  # which decides the dtypes of products
        return None
    random = _random_state() if head not in _last else None
    with _loss_instead(head, model, positions, targets) as found:
        logits = run().logits
    if random is not None and len(targets):
        # A model that multiplies by the projection's weight itself, without calling it, gives no output of it.
        _last[head] = found.logits is not None and torch.equal(found.logits.float(), logits.float())
        if not _last[head]:
            _restore(random)
            return None
    return found.loss_and_hits


def logits_at(model: nn.Module, run: Callable[[], Any], positions: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` at some positions (``[rows, tokens]``, bool); others are computed only where the model
    does not call its projection as a module."""
    head = output_projection(model)

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_at(positions, args[0], model), *args[1:])

    hooks = [] if head is None else [head.register_forward_pre_hook(select, prepend=True)]
    with _hooked(*hooks):
        logits: Tensor = run().logits
    return logits if logits.dim() == 2 else logits[positions]


@contextlib.contextmanager
def taking_hidden(head: nn.Module, model: nn.Module, positions: Tensor) -> Iterator[list[Tensor]]:
    """Take what goes into the projection at some positions, ``[n, width]``; the projection gets the first."""
    taken: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        taken.append(_at(positions, args[0], model))
        return (taken[0][:1], *args[1:])

    with _hooked(head.register_forward_pre_hook(take, prepend=True)):
        yield taken


@dataclass
class _Found:
    loss_and_hits: tuple[Tensor, Tensor] | None = None
    logits: Tensor | None = None
    """The projection's output at the first position."""


@contextlib.contextmanager
def _loss_instead(head: nn.Linear, model: nn.Module, positions: Tensor, targets: Tensor) -> Iterator[_Found]:
    found = _Found()

    def take(module: nn.Linear, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = _at(positions, args[0], model)
        found.loss_and_hits = cross_entropy_sum(hidden, module.weight, module.bias, targets)
        return (hidden[:1], *args[1:])

    def note(module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        found.logits = output

    # Last of its hooks: by then the module has the parameters it runs on.
    with _hooked(head.register_forward_pre_hook(take), head.register_forward_hook(note)):
        if head not in _last or "forward" in head.__dict__:
            yield found
            return
        # Nobody reads the logits: even those of one position take all of the weight to compute. Of the graph, as DDP
        # looks from the output for parameters that play a part.
        head.__dict__["forward"] = lambda hidden: (0 * hidden.sum()).expand(1, len(head.weight))
        try:
            yield found
        finally:
            del head.__dict__["forward"]


def _at(positions: Tensor, hidden: Tensor, model: nn.Module) -> Tensor:
    inner = _unwrapped(model)
    return (inner.base.at_tokens(hidden) if isinstance(inner, Adapter) else hidden)[positions]


@contextlib.contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unwrapped(model: nn.Module) -> Any:
    return getattr(model, "module", model)  # DDP wraps


def _random_state() -> Random:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _restore(state: Random) -> None:
    torch.set_rng_state(state[0])
    for device, own in enumerate(state[1]):
        torch.cuda.set_rng_state(own, device)
