"""Tensors that have shapes, dtypes and lifetimes, but no numbers, so that nothing is computed and nothing is held.

torch's fake tensors do this for all that depends on shapes. Some code asks for numbers, too: is the mask all ones,
which entries are labelled, which are drawn twice. Here such questions get the answers of the common case:

    bool(x), x.all(), equal(x, y)     yes
    int(x), float(x)                  0
    x[mask], nonzero(mask)            as many as were said to be labelled where the mask is of tokens, else half
    unique(x)                         x: all different
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


@contextlib.contextmanager
def shapes_only(*, tokens: int = 0, labelled: int = 0) -> Iterator[None]:
    """Inside the block no tensor has numbers, nor takes memory for them; devices are as they say.

    Args:
        tokens: of a batch: how many entries its masks have.
        labelled: how many of them a mask picks.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _Answers(tokens, labelled):
        yield


class _Answers(TorchDispatchMode):
    """What fake tensors can't tell, as it usually is."""

    def __init__(self, tokens: int, labelled: int) -> None:
        super().__init__()
        self.tokens, self.labelled = tokens, labelled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func)
        return func(*args, **(kwargs or {})) if answer is None else answer(self, func, *args, **(kwargs or {}))

    def number(self, func: Any, x: Tensor) -> bool | int | float:
        """Of one entry."""
        return True if x.dtype == torch.bool else 0.0 if x.dtype.is_floating_point else 0

    def equal(self, func: Any, x: Tensor, y: Tensor) -> bool:
        """Whether all are the same."""
        return x.shape == y.shape

    def picked(self, mask: Tensor) -> int:
        """How many entries of a mask are true."""
        return self.labelled if mask.numel() == self.tokens else (mask.numel() + 1) // 2

    def nonzero(self, func: Any, mask: Tensor) -> Tensor:
        """Indices ``[n, axes]``."""
        return mask.new_empty(self.picked(mask), mask.dim(), dtype=torch.long)

    def index(self, func: Any, x: Tensor, indices: list[Tensor | None], *values: Any, **more: Any) -> Any:
        """With masks as indices."""
        return func(x, self._as_indices(indices), *values, **more)

    def _as_indices(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for each in indices:
            if each is None or each.dtype != torch.bool:
                found.append(each)
            else:
                found += [each.new_empty(self.picked(each), dtype=torch.long) for _ in range(each.dim())]
        return found

    def masked_select(self, func: Any, x: Tensor, mask: Tensor) -> Tensor:
        """``[n]``."""
        return x.new_empty(self.picked(mask))

    def unique(self, func: Any, x: Tensor, *how: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """All of them."""
        places = x.new_empty(x.shape, dtype=torch.long)
        return x.new_empty(x.numel()), places, places

    def choice(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
        *how: Any, **more: Any,
    ) -> int:  # fmt: skip
        """The form of attention a processor takes: flash (1) where it can, else plain products (0)."""
        learned = mask is not None and mask.requires_grad
        return int(dropout == 0 and not learned and query.shape[-1] == value.shape[-1] and query.dim() == 4)

    def attention(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *how: Any, **more: Any) -> Any:
        """The processor's own attention, which fake tensors would take apart into what it never keeps."""
        rows, heads, queries, _ = query.shape
        sums = torch.promote_types(query.dtype, torch.float32)
        output = query.new_empty(rows, queries, heads, value.shape[-1]).transpose(1, 2)
        return output, query.new_empty(rows, queries, heads, dtype=sums).transpose(1, 2)

    def bincount(self, func: Any, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
        """None beyond those asked for."""
        return x.new_empty(minlength, dtype=torch.long if weights is None else torch.double)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: _Answers.number,
    _aten.equal.default: _Answers.equal,
    _aten.nonzero.default: _Answers.nonzero,
    _aten.index.Tensor: _Answers.index,
    _aten.index_put.default: _Answers.index,
    _aten.index_put_.default: _Answers.index,
    _aten.masked_select.default: _Answers.masked_select,
    _aten._unique2.default: _Answers.unique,
    _aten.bincount.default: _Answers.bincount,
    _aten._fused_sdp_choice.default: _Answers.choice,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _Answers.attention,
}
