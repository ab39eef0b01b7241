"""What tests of the forms in C share: how near to the exact numbers they are, beside the plain ones."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers import Called
from veneer.kernels import native
from veneer.kernels.native import tiles

COMPILER = os.environ.get("VENEER_NATIVE") != "0" and sys.platform == "linux" and shutil.which("gcc") is not None
compiled = pytest.mark.skipif(not COMPILER, reason="there is no gcc, or VENEER_NATIVE=0")
tiled = pytest.mark.skipif(not COMPILER or not tiles.there(), reason="there are no tiles (AMX)")
DTYPES = [torch.float32, torch.bfloat16]
BOUND = 1.1
"""How much further from the exact result than the plain form."""
CHANCE = torch.finfo(torch.float32).eps / 2
"""One rounding: sums of a few numbers are as near as chance has it, whichever way they are added up."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def errors(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> tuple[list[float], set[str]]:
    """How far output and gradients are from those in float64, relative to these, of the same rounded inputs."""
    rounded = [each.to(dtype) for each in inputs]
    results = []
    with Called() as called:
        for tensors in (rounded, [each.double() for each in rounded]):
            given = [each.clone().requires_grad_() for each in tensors]
            output = function(*given)
            weights = torch.linspace(-1, 1, output.numel()).cos().view(output.shape).to(output.dtype)
            results.append((output.detach(), *torch.autograd.grad((output * weights).sum(), given)))
    pairs = zip(*results, strict=True)
    return [float((mine.double() - exact).norm() / exact.norm()) for mine, exact in pairs], called.names


def as_near(
    function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, *expected: str, chance: float = 1e-8
) -> None:
    """As the plain form is; and the form in C did run."""
    ours, called = errors(function, inputs, dtype)
    assert called >= set(expected)
    with native.plain():
        plain, called = errors(function, inputs, dtype)
    assert not called
    for mine, other in zip(ours, plain, strict=True):
        assert mine <= BOUND * other + chance, (ours, plain)
