"""Small networks that methods train to make their parameters by (reparametrisation), with torch's own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from veneer.methods.base import widened

Build = Callable[[], nn.Module]
"""Makes the module, on torch's default device."""


def started(build: Build, generator: torch.Generator, prefix: str) -> dict[str, Tensor]:
    """The module's initial parameters by name, as torch starts them; the global random state is left alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        module = build()
    return {prefix + name: widened(value.detach()) for name, value in module.named_parameters()}


def run(build: Build, parameters: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """The module's output on other parameters than its own, found by name behind the prefix."""
    with torch.device("meta"):
        module = build()
    own = {name: parameters[prefix + name] for name, _ in module.named_parameters()}
    output = torch.func.functional_call(module, own, (x,))
    return output[0] if isinstance(output, tuple) else output  # recurrent modules give their last state, too
