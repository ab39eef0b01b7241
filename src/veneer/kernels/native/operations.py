"""What is compiled, as operations of torch's library ``veneer``.

What each computes is said where it is used (`veneer.kernels`); shapes are given here. Tensors are dense unless it is
said that only their last axis has to be.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.native.build import library, there

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
ACTS: Mapping[int, Callable[[Tensor], Tensor]] = {0: F.silu, 1: functools.partial(F.gelu, approximate="tanh")}
"""Activations of gates, by their numbers in native.c."""
_LIBRARY = torch.library.Library("veneer", "DEF")
KINDS: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "s": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "f": ctypes.c_float,
    "i": ctypes.c_int,
}
_ARGUMENTS = {
    "rms_norm": "ppppnnfiii",
    "rms_norm_backward": "pppppnni",
    "gated": "pppnnii",
    "gated_backward": "pppppnnii",
    "scaled": "ppppnni",
    "scaled_backward": "ppppppnni",
    "rotary": "psppnpsnnnnii",
    "cross_entropy": "pppppnnii",
    "pack": "pspsnnnnfipfi",
    "columns": "pnnpfi",
    "dots": "pspspnnnni",
    "greatest": "ppspnnnnnfi",
    "powers": "ppspnnnnnfi",
    "change": "ppnni",
    "divided": "ppppsnnnni",
}
"""Of the C functions here: p pointers, s strides, n sizes, f float, i int; the last is the number of threads."""


def suits(*tensors: Tensor) -> bool:
    """Whether there is a compiled form for such tensors: on the processor, not empty, all of one dtype and shape."""
    first = tensors[0]
    alike = all(each.dtype == first.dtype and each.shape == first.shape for each in tensors[1:])
    here = all(each.device.type == "cpu" for each in tensors)
    return here and alike and first.dtype in _NAMES and first.numel() > 0 and there()


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    loaded = library()
    assert loaded is not None
    function = loaded[f"{name}_{_NAMES[dtype]}"]
    function.argtypes = [KINDS[each] for each in _ARGUMENTS[name]]
    function.restype = None
    return function


def _run(name: str, like: Tensor, *arguments: Any) -> None:
    """Call the form for the dtype of ``like``."""
    _function(name, like.dtype)(*arguments, torch.get_num_threads())


def strides(x: Tensor) -> Any:
    """All but the last axis's, for C."""
    return (ctypes.c_int64 * (x.dim() - 1))(*x.stride()[:-1])


def address(x: Tensor | None) -> int | None:
    """Of its numbers; None of None."""
    return None if x is None else x.data_ptr()


def operation(schema: str, shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operation; ``shapes`` makes what it gives, without numbers."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)
        name = schema.split("(")[0]
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"veneer::{name}", shapes, lib=_LIBRARY)
        registered: Callable[..., Any] = getattr(torch.ops.veneer, name).default
        return registered

    return register


def _nothing(*args: Any) -> None:
    """Of what writes in place."""


def _like(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


def _two_like(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _with_rho(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@operation("rms_norm(Tensor x, Tensor weight, float eps, bool rounded) -> (Tensor, Tensor)", _with_rho)
def rms_norm(x: Tensor, weight: Tensor, eps: float, rounded: bool) -> tuple[Tensor, Tensor]:
    """y like x ``[…, d]`` and ρ ``[…, 1]``; weight is float32."""
    y, rho = _with_rho(x)
    width = x.shape[-1]
    sizes = x.numel() // width, width
    _run("rms_norm", x, address(x), address(weight), address(y), address(rho), *sizes, eps, rounded, False)
    return y, rho


@operation("rms_normed(Tensor x, Tensor weight, Tensor rho, bool rounded) -> Tensor", _like)
def rms_normed(x: Tensor, weight: Tensor, rho: Tensor, rounded: bool) -> Tensor:
    """y once more."""
    y, width = torch.empty_like(x), x.shape[-1]
    sizes = x.numel() // width, width
    _run("rms_norm", x, address(x), address(weight), address(y), address(rho), *sizes, 0.0, rounded, True)
    return y


@operation("rms_norm_backward(Tensor x, Tensor weight, Tensor rho, Tensor dy) -> Tensor", _like)
def rms_norm_backward(x: Tensor, weight: Tensor, rho: Tensor, dy: Tensor) -> Tensor:
    """dx."""
    dx, width = torch.empty_like(x), x.shape[-1]
    sizes = x.numel() // width, width
    _run("rms_norm_backward", x, address(x), address(weight), address(rho), address(dy), address(dx), *sizes)
    return dx


@operation("gated(Tensor gate, Tensor up, int act) -> Tensor", _like)
def gated(gate: Tensor, up: Tensor, act: int) -> Tensor:
    """y; act is one of `ACTS`."""
    y, width = torch.empty_like(gate), gate.shape[-1]
    _run("gated", gate, address(gate), address(up), address(y), gate.numel() // width, width, act)
    return y


@operation("gated_backward(Tensor gate, Tensor up, Tensor dy, int act) -> (Tensor, Tensor)", _two_like)
def gated_backward(gate: Tensor, up: Tensor, dy: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """dgate and dup."""
    dgate, dup = _two_like(gate)
    sizes = gate.numel() // gate.shape[-1], gate.shape[-1]
    _run("gated_backward", gate, address(gate), address(up), address(dy), address(dgate), address(dup), *sizes, act)
    return dgate, dup


@operation("scaled(Tensor x, Tensor v, Tensor? bias) -> Tensor", _like)
def scaled(x: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """y like x ``[…, d]``; v ``[d]`` is float32, the bias ``[d]`` of the dtype of x."""
    y, width = torch.empty_like(x), x.shape[-1]
    _run("scaled", x, address(x), address(v), address(bias), address(y), x.numel() // width, width)
    return y


def _with_sums(x: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(v)


@operation("scaled_backward(Tensor x, Tensor v, Tensor? bias, Tensor dy) -> (Tensor, Tensor)", _with_sums)
def scaled_backward(x: Tensor, v: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dv."""
    dx, dv = _with_sums(x, v)
    tensors = (address(each) for each in (x, v, bias, dy, dx, dv))
    _run("scaled_backward", x, *tensors, x.numel() // x.shape[-1], x.shape[-1])
    return dx, dv


def _turned(x: Tensor, *args: Any) -> Tensor:
    rows, heads, places, width = x.shape
    return x.new_empty(rows, places, heads, width).transpose(1, 2)  # as linear maps give and take it


@operation("rotary(Tensor x, Tensor cos, Tensor sin, bool backward) -> Tensor", _turned)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """y, or dx, the heads of a place beside each other in memory. x is ``[rows, heads, places, d]``, dense in its last
    axis; cosines and sines are ``[rows or 1, 1, places, d]``."""
    y = _turned(x)
    of_row = cos.stride(0) if len(cos) > 1 else 0
    tables = address(cos), address(sin), of_row
    _run("rotary", x, address(x), strides(x), *tables, address(y), strides(y), *x.shape, backward)
    return y


def some_class(targets: Tensor, classes: int) -> Tensor:
    """Targets as C reads them.

    Raises:
        IndexError: one is none of the classes.
    """
    targets = targets.long().contiguous()
    if not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise IndexError(f"Targets reach from {targets.min()} to {targets.max()}; there are {classes} classes.")
    return targets


def _by_row(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.int64)


@operation("cross_entropy(Tensor(a!) logits, Tensor targets, bool gradient) -> (Tensor, Tensor)", _by_row)
def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss and hit of each row of logits ``[n, v]``, which become their gradient; targets are ``[n]``.

    Raises:
        IndexError: a target is none of the classes.
    """
    targets = some_class(targets, logits.shape[1])
    losses, hits = _by_row(logits)
    work = logits.new_empty(torch.get_num_threads(), logits.shape[1], dtype=torch.float32)
    tensors = (address(each) for each in (logits, targets, losses, hits, work))
    _run("cross_entropy", logits, *tensors, *logits.shape, gradient)
    return losses, hits


@operation(
    "pack(Tensor x, Tensor(a!) y, float scale, bool columns, Tensor? taken=None, float share=1.0) -> ()", _nothing
)
def pack(x: Tensor, y: Tensor, scale: float, columns: bool, taken: Tensor | None = None, share: float = 1.0) -> None:
    """``scale · x`` into y; both ``[rows, heads, places, d]`` and dense in their last axis. With columns y is two
    longer: their sum is ``share · taken``, which is ``[rows, heads, places]``, or without it each is ``share``."""
    of = strides(x), strides(y)
    _run("pack", x, address(x), of[0], address(y), of[1], *x.shape, scale, columns, address(taken), share)


@operation("columns(Tensor(a!) y, Tensor taken, float share) -> ()", _nothing)
def columns(y: Tensor, taken: Tensor, share: float) -> None:
    """The last two columns of y ``[…, d + 2]`` anew."""
    width = y.shape[-1]
    _run("columns", y, address(y), y.numel() // width, width, address(taken), share)


@operation("dots(Tensor x, Tensor y) -> Tensor", lambda x, y: x.new_empty(x.shape[:-1], dtype=torch.float32))
def dots(x: Tensor, y: Tensor) -> Tensor:
    """Sums of x · y over the last axis, in which alone both have to be dense; ``[rows, heads, places]``."""
    found = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _run("dots", x, address(x), strides(x), address(y), strides(y), address(found), *x.shape)
    return found


_SCORES = "Tensor? mask, int first, float scale"


def _of_mask(mask: Tensor | None) -> Any:
    return (
        None
        if mask is None
        else (ctypes.c_int64 * 3)(*(0 if n == 1 else s for n, s in zip(mask.shape[:3], mask.stride()[:3], strict=True)))
    )


@operation(
    f"greatest(Tensor scores, {_SCORES}) -> Tensor",
    lambda scores, *args: scores.new_empty(scores.shape[:-1], dtype=torch.float32),
)
def greatest(scores: Tensor, mask: Tensor | None, first: int, scale: float) -> Tensor:
    """Of scores ``[rows, heads, queries, keys]``, by query. The mask ``[rows or 1, heads or 1, queries or 1, keys]`` is
    dense in its last axis. Keys later than ``first`` and the query's own number are not seen; all are if it is
    negative."""
    found = scores.new_empty(scores.shape[:-1], dtype=torch.float32)
    of_mask = _of_mask(mask)
    _run("greatest", scores, address(scores), address(mask), of_mask, address(found), *scores.shape, first, scale)
    return found


@operation(
    f"powers(Tensor(a!) scores, {_SCORES}) -> Tensor",
    lambda scores, *args: scores.new_empty(scores.shape[:-1], dtype=torch.float32),
)
def powers(scores: Tensor, mask: Tensor | None, first: int, scale: float) -> Tensor:
    """Their exponentials in their place, and the sums of these, by query."""
    sums = scores.new_empty(scores.shape[:-1], dtype=torch.float32)
    of_mask = _of_mask(mask)
    _run("powers", scores, address(scores), address(mask), of_mask, address(sums), *scores.shape, first, scale)
    return sums


@operation("change(Tensor(a!) change, Tensor powers) -> ()", _nothing)
def change(change: Tensor, powers: Tensor) -> None:
    """``change · powers`` in the place of change ``[…, keys]``."""
    width = change.shape[-1]
    _run("change", change, address(change), address(powers), change.numel() // width, width)


@operation("divided(Tensor x, Tensor sums, Tensor(a!) logs, Tensor(b!) y) -> ()", _nothing)
def divided(x: Tensor, sums: Tensor, logs: Tensor, y: Tensor) -> None:
    """``x / sums`` into y, dense in its last axis; logs grow by the sums'."""
    _run("divided", x, address(x), address(sums), address(logs), address(y), strides(y), *x.shape)
