"""The pair of hooks of one module, installed once, which carries out what the plan says for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.execution import Execution
from veneer.adapters.linears import Map, Siblings
from veneer.bases.quantized import runs_on_others
from veneer.bases.weights import parameters_of, stored
from veneer.deltas import Delta, Rows
from veneer.errors import AdapterError
from veneer.kernels.frozen import frozen_linear


@dataclass
class _Call:
    """One call of the module: its input, and parameters that were swapped out for it."""

    x: Any
    own: dict[str, Tensor | None] = field(default_factory=dict)
    at_once: bool = False
    """Module and delta were computed as one."""


class SiteHooks:
    """The pair of hooks of one module.

    Args:
        path: of the module.
        execution: what acts now.
        input: a name for the module's input, the same for all that get the same.
    """

    def __init__(self, path: str, execution: Execution, input: str) -> None:
        self.path = path
        self.execution = execution
        self.siblings = execution.siblings.setdefault(input, Siblings())
        self._calls: list[_Call] = []

    def install(self, module: nn.Module) -> list[Any]:
        """Register both hooks; the handles remove them again."""
        handles: list[Any] = [
            module.register_forward_pre_hook(self.before),
            module.register_forward_hook(self.after, always_call=True),
        ]
        if type(module) is nn.Linear and self.execution.fast is not None:
            forward = functools.partial(self.forward, module)
            self.execution.fast.linears[module] = forward
            self.siblings.maps[self.path] = Map(module, forward)
            handles += [_Entry(self.execution.fast.linears, module), _Entry(self.siblings.maps, self.path)]
        return handles

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Swap in the parameters the delta wants the module to run on, and change its input."""
        call = _Call(args[0] if args else None)
        self._calls.append(call)  # before anything can fail: `after` is called in any case
        plan = self.execution.plan
        self.execution.flow.record(self.path, call.x)
        if (delta := plan.modules.get(self.path)) is None:
            return None
        if not isinstance(delta, Rows):
            _swap(module, delta, call.own)
        x = delta.before(call.x)
        return None if x is call.x else (x, *args[1:])

    def forward(self, module: nn.Linear, x: Tensor) -> Tensor:
        """A linear map's own forward, or all of it and the delta at once."""
        own = self._calls and self._calls[-1].x is x  # somebody's hook may have given it another
        plain = torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        y = self.siblings.output(self.path, x, self.execution.plan) if own and plain else None
        if y is None:
            return frozen_linear(x, module.weight, module.bias)
        self._calls[-1].at_once = True
        return y

    def after(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
        """Put the module's own parameters back, then let the delta change the output."""
        call = self._calls.pop()
        module._parameters.update(call.own)  # type: ignore[arg-type]
        if call.at_once:
            return None
        delta = self.execution.plan.modules.get(self.path)
        if delta is None or not isinstance(y, Tensor):  # no output: the call failed
            return None
        if isinstance(delta, Rows):
            return delta.apply_rows(call.x, y, lambda part, x: _rerun(module, part, x))
        return delta.apply(call.x, y)


@dataclass(frozen=True)
class _Entry:
    """A handle of what is kept in a table."""

    table: dict[Any, Any]
    key: Any

    def remove(self) -> None:
        """It is not kept any more."""
        self.table.pop(self.key, None)


def _swap(module: nn.Module, delta: Delta, own: dict[str, Tensor | None]) -> None:
    if not delta.swaps:  # a quantised weight is not dequantised for nothing
        return
    values = delta.effective(parameters_of(module))
    if "weight" in values and not runs_on_others(module):
        raise AdapterError(
            f"{type(module).__module__}.{type(module).__name__} cannot run on another weight than its own, which this "
            'adapter asks of it; load the base with veneer.load_base(name, quantize="nf4").'
        )
    for name, value in stored(module, values).items():
        own[name] = module._parameters[name]
        module._parameters[name] = value  # type: ignore[assignment]


def _rerun(module: nn.Module, delta: Delta, x: Tensor) -> Tensor:
    own: dict[str, Tensor | None] = {}
    try:
        _swap(module, delta, own)
        return module.forward(x)
    finally:
        module._parameters.update(own)  # type: ignore[arg-type]
