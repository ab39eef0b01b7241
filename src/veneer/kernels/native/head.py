"""Cross-entropy of a head's logits by tiles, as an operation of torch's library ``veneer``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from veneer.kernels.native import product, tiles
from veneer.kernels.native.operations import address, operation, some_class


def suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there is a compiled form for these: x ``[n, d]``, as for products; weight dense."""
    return x.dim() == 2 and weight.is_contiguous() and product.suits(x, weight, bias)


def _made(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradient: bool) -> tuple[Tensor, ...]:
    losses, hits = x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), dtype=torch.int64)
    return x.new_empty(x.shape if gradient else 0), losses, hits


@operation(
    "head(Tensor x, Tensor weight, Tensor? bias, Tensor targets, bool gradient) -> (Tensor, Tensor, Tensor)", _made
)
def head(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the losses' sum by x ``[n, d]``, which has no numbers unless it is asked for; loss (float32) and
    hit of each row of ``x weightᵀ + bias``, ``[n]``. All but targets are dense.

    Raises:
        IndexError: a target is none of the classes.
    """
    dx, losses, hits = _made(x, weight, bias, targets, gradient)
    targets = some_class(targets, len(weight))
    width = x.shape[1]
    seen = x.new_empty(tiles.function("head_seen_work", "n")(len(x)), dtype=torch.uint8)
    sums = x.new_empty(tiles.function("head_sums_work", "nn")(len(x), width) if gradient else 0, dtype=torch.float32)
    work = tiles.work(x, "head_work", [width])
    tiles.function("head", "pnnpnppippppppnii")(
        address(x), len(x), width, address(weight), len(weight), address(bias), address(targets), gradient,
        address(losses), address(hits), address(dx), address(seen), address(sums), address(work), work.shape[1],
        tiles.PARTS[x.dtype], len(work),
    )  # fmt: skip
    return dx, losses, hits


@register_flop_formula(torch.ops.veneer.head)
def _flops(x: Any, weight: Any, bias: Any, targets: Any, gradient: bool, **kwargs: Any) -> int:
    return int(2 * torch.Size(x).numel() * weight[0] * (2 if gradient else 1))
