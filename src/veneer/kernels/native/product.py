"""A product by tiles, as an operation of torch's library ``veneer``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from veneer.kernels.native import tiles
from veneer.kernels.native.operations import address, operation


def suits(x: Tensor, right: Tensor, bias: Tensor | None = None, *, by_depth: bool = False) -> bool:
    """Whether there is a compiled form for these: all of float32, or of bfloat16 where the width of x is a multiple of
    32; on a processor with tiles, right dense in its last axis, and the bias; and whether shapes fit."""
    depth, columns = right.shape if by_depth else right.shape[::-1]
    if x.shape[-1:] != (depth,) or (bias is not None and bias.shape != (columns,)):
        return False
    given = [x, right] if bias is None else [x, right, bias]
    usual = all(each.device.type == "cpu" and tiles.ordinary(each) and each.dtype == x.dtype for each in given)
    fit = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and x.shape[-1] % tiles.SIDE == 0)
    return usual and fit and all(each.stride(-1) == 1 for each in given[1:]) and x.numel() > 0 and tiles.there()


@operation("product(Tensor x, Tensor right, Tensor? bias, bool by_depth, Tensor(a!) y) -> ()", lambda *args: None)
def product(x: Tensor, right: Tensor, bias: Tensor | None, by_depth: bool, y: Tensor) -> None:
    """``x rightᵀ + bias``, or ``x right`` by depth, into y; x ``[…, depth]`` and y ``[…, columns]`` are dense, y may be
    float32 where the others are not."""
    depth, columns, wide = x.shape[-1], y.shape[-1], y.dtype == torch.float32
    work = tiles.work(x, "products_work", [tiles.padded(depth)], wide)
    tiles.function("product", "pnnpnnippipnii")(
        address(x), x.numel() // depth, depth, address(right), right.stride(0), columns, by_depth, address(bias),
        address(y), wide, address(work), work.shape[1], tiles.PARTS[x.dtype], len(work),
    )  # fmt: skip


@register_flop_formula(torch.ops.veneer.product)
def _flops(x: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * torch.Size(x[:-1]).numel() * torch.Size(right).numel())
