"""A batch in parts, each of few enough tokens: the same step, in less memory.

Losses are sums over a step's items divided by their number, so that the gradient of a batch is the sum of its parts'.
What a forward keeps for its backward is that of one part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def count(rows: int, length: int, tokens: int) -> int:
    """In how many parts so many rows of this length are computed; arguments as `parts` has them."""
    return math.ceil(rows / max(tokens // length, 1)) if tokens else 1


def parts(batch: Mapping[str, Any], tokens: int) -> Sequence[Mapping[str, Any]]:
    """The rows of a batch a few at a time, about equally many.

    Args:
        batch: tensors and lists with an entry a row; ``attention_mask`` is ``[rows, length]``.
        tokens: in a part at most, padding counted, but a whole row at least; 0 leaves the batch as it is.
    """
    rows, length = batch["attention_mask"].shape
    number = count(rows, length, tokens)
    if number == 1:
        return [batch]
    bounds = [rows * part // number for part in range(number + 1)]
    return [
        {name: _rows(value, slice(first, last)) for name, value in batch.items()}
        for first, last in itertools.pairwise(bounds)
    ]


def _rows(value: Any, some: slice) -> Any:
    return value[some] if isinstance(value, (Tensor, list)) else value
