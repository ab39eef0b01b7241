"""Memory and work of code that is run on shapes: which bytes live when, which operations touch them.

Every operation's new storages are entered with what they are for, and struck out when nothing refers to them any more,
as Python and autograd hold them: what is kept for a backward is what the code really keeps. What is alive is noted
whenever something is added. What an operation takes and gives back inside itself is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from veneer.kernels.rounds import counting


@dataclass(frozen=True)
class Work:
    """One operation.

    Attributes:
        name: torch's, without its overload.
        flops: of products, a multiply-add counted as two; 0 of all else.
        nbytes: read and written.
        numbers: in its greatest tensor.
        dtype: of its first tensor.
        ours: whether it is of veneer's own forms.
    """

    name: str
    flops: int
    nbytes: int
    numbers: int
    dtype: torch.dtype
    ours: bool = False


@dataclass(frozen=True)
class Moment:
    """One at which something was added.

    Attributes:
        name: of the operation that made it; empty where something was entered.
        nbytes: made.
        alive: bytes by kind, with it.
    """

    name: str
    nbytes: int
    alive: Mapping[str, int]

    @cached_property
    def total(self) -> int:
        """Bytes alive."""
        return sum(self.alive.values())


class Ledger(TorchDispatchMode):
    """Keeps the books while it is entered (around `shapes_only`'s own block: innermost).

    Args:
        vocabulary: storages with an axis of this length are logits, whatever else they would be; None for none.

    Attributes:
        work: the operations, in order.
        moments: phase -> its moments, in order.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.work: list[Work] = []
        self.alive: dict[str, int] = {}
        self.moments: dict[str, list[Moment]] = {}
        self._entered: dict[int, tuple[str, int]] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._phase, self._kind = "", ""

    @property
    def peaks(self) -> dict[str, Mapping[str, int]]:
        """Phase -> bytes by kind at the moment of it at which most was alive."""
        return {phase: max(there, key=lambda each: each.total).alive for phase, there in self.moments.items()}

    @contextlib.contextmanager
    def phase(self, name: str, kind: str) -> Iterator[None]:
        """Storages made inside the block are of this kind."""
        before = self._phase, self._kind
        self._phase, self._kind = name, kind
        self._note("", 0)
        try:
            yield
        finally:
            self._phase, self._kind = before

    @contextlib.contextmanager
    def shortened(self) -> Iterator[None]:
        """Of loops whose rounds are alike two are run, and count for all; on tensors without numbers only."""

        def repeat() -> Callable[[int], None]:
            began = len(self.work)
            return lambda times: self.work.extend(self.work[began:] * times)

        with counting(repeat):
            yield

    def enter(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors that are there already, or were counted as another kind."""
        for tensor in tensors:
            self._add(tensor, kind)
        self._note("", 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace not in ("aten", "veneer"):  # questions such as for a tensor's device
            return result
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        for tensor in made:
            if id(tensor.untyped_storage()) not in self._entered:
                logits = self.vocabulary is not None and self.vocabulary in tensor.shape
                self._add(tensor, "logits" if logits else self._kind)
                self._note(func.__name__, tensor.untyped_storage().nbytes())
        self._record(func, args, kwargs or {}, result, made)
        return result

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = id(storage), storage.nbytes()
        self._strike(key)
        self._entered[key] = (kind, nbytes)
        self._references[key] = weakref.ref(storage, lambda _: self._strike(key))
        self.alive[kind] = self.alive.get(kind, 0) + nbytes

    def _strike(self, key: int) -> None:
        if key in self._entered:
            kind, nbytes = self._entered.pop(key)
            self._references.pop(key, None)
            self.alive[kind] -= nbytes

    def _note(self, name: str, nbytes: int) -> None:
        there = self.moments.setdefault(self._phase, [])
        if not name and there and not there[-1].name:
            there.pop()  # what is entered in a row is one moment
        there.append(Moment(name, nbytes, dict(self.alive)))

    def _record(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any, made: list[Tensor]) -> None:
        packet = func._overloadpacket
        if packet in _FREE or func.is_view:
            return
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        touched = {id(each): each for each in (*read, *made)}.values()
        if not touched:
            return
        count = _COUNTS.get(packet) or flop_registry.get(packet)
        flops = int(count(*args, **kwargs, out_val=result)) if count is not None else 0
        numbers = max(each.numel() for each in touched)
        nbytes = sum(each.nbytes for each in touched)
        dtype, ours = (made or read)[0].dtype, func.namespace == "veneer"
        self.work.append(Work(packet.__name__, flops, nbytes, numbers, dtype, ours))


_aten = torch.ops.aten
_FREE = {_aten.detach, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.lift_fresh}
"""Operations that touch no numbers."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_COUNTS: dict[Any, Any] = {  # which torch's own registry leaves out
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
