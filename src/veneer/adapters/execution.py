"""What acts now: the plan of deltas, and the hooks that carry it out.

A plan maps module paths to deltas. It is made once at the start of each forward of the base, outside any
activation checkpoint, and is read by one pair of hooks per site, installed once. Hooks never write to the base:
a delta that needs other parameters has them swapped in for the module's own call and taken out again, also when
the call fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from veneer.deltas import Delta

Plan: TypeAlias = Mapping[str, Delta]


@dataclass(eq=False)
class Execution:
    """The plan in force, and what makes the next one.

    The plan outlives the forward it was made for, because an activation checkpoint recomputes parts of that
    forward during backward; the next forward replaces it.
    """

    lower: Callable[[], Plan] | None = None
    plan: Plan = field(default_factory=dict)
    _depth: int = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook of the base: make the plan at the outermost call."""
        self._depth += 1
        if self._depth == 1:
            self.plan = self.lower() if self.lower else {}

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Post-hook of the base, called after exceptions too."""
        self._depth -= 1

    @contextlib.contextmanager
    def acting(self, lower: Callable[[], Plan] | None) -> Iterator[None]:
        """Have forwards inside the block act by plans of ``lower``; None is the plain base."""
        before, self.lower = self.lower, lower
        try:
            yield
        finally:
            self.lower = before

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager[None], ...]:
        """``context_fn`` for `torch.utils.checkpoint`: recompute with the plan the forward ran with."""
        return contextlib.nullcontext(), self._with_plan(self.plan)

    @contextlib.contextmanager
    def _with_plan(self, plan: Plan) -> Iterator[None]:
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before


class SiteHooks:
    """The pair of hooks of one module."""

    def __init__(self, path: str, execution: Execution) -> None:
        self.path = path
        self.execution = execution
        self._own: list[dict[str, Tensor | None]] = []

    def install(self, module: nn.Module) -> list[Any]:
        """Register both hooks; the handles remove them again."""
        return [
            module.register_forward_pre_hook(self.before),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Swap in the parameters the delta wants the module to run on."""
        own: dict[str, Tensor | None] = {}
        self._own.append(own)  # before anything can fail: `after` is called in any case
        if (delta := self.execution.plan.get(self.path)) is None:
            return
        for name, value in delta.effective(_tensors(module)).items():
            own[name] = module._parameters[name]
            module._parameters[name] = value  # type: ignore[assignment]

    def after(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
        """Put the module's own parameters back, then let the delta change the output."""
        for name, value in self._own.pop().items():
            module._parameters[name] = value  # type: ignore[assignment]
        delta = self.execution.plan.get(self.path)
        if delta is None or not isinstance(y, Tensor):  # no output: the call failed
            return None
        return delta.apply(args[0], y)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module._parameters.items() if value is not None}


def install(execution: Execution, roots: Iterable[nn.Module]) -> list[Any]:
    """Hook the modules whose forward starts a step."""
    handles: list[Any] = []
    for root in roots:
        handles.append(root.register_forward_pre_hook(execution.enter))
        handles.append(root.register_forward_hook(execution.leave, always_call=True))
    return handles
