"""What acts now: a plan of deltas, made once a step, and the state in which the base runs it.

Hooks never write to the base for longer than a call: parameters and attention implementations are swapped in for a
module's own call, or a forward, and put back, also when it fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from veneer.adapters import prefixes
from veneer.bases import SiteMap
from veneer.deltas import Delta, KeyValues, Rows, Tokens

ByRow = Sequence[Delta | None]
"""A delta for each row of the batch, or none."""


@dataclass(frozen=True)
class Plan:
    """Deltas by where they act.

    Attributes:
        modules: around modules, by path.
        attention: keys and values in attention modules, by path; a list is by rows.
        tokens: virtual tokens before the input; a list is by rows.
        rows: how many rows the batch has, if the plan is by rows.
        split: in modules whose rows can't be mixed inside, by path: the plans of the rows that have an adapter there.
    """

    modules: Mapping[str, Delta] = field(default_factory=dict)
    attention: Mapping[str, KeyValues | Sequence[KeyValues | None]] = field(default_factory=dict)
    tokens: Tokens | Sequence[Tokens | None] | None = None
    rows: int | None = None
    split: Mapping[str, Sequence[tuple[Sequence[int], Plan]]] = field(default_factory=dict)

    @classmethod
    def of(cls, deltas: Mapping[str, Delta]) -> Plan:
        """Of one adapter, for all rows."""
        return cls(
            {path: delta for path, delta in deltas.items() if not isinstance(delta, KeyValues | Tokens)},
            {path: delta for path, delta in deltas.items() if isinstance(delta, KeyValues)},
            next((delta for delta in deltas.values() if isinstance(delta, Tokens)), None),
        )

    @classmethod
    def by_rows(cls, plans: Sequence[tuple[Sequence[int], Plan]], rows: int, sites: SiteMap) -> Plan:
        """Of several adapters, each for some rows of a base with these sites."""
        split: dict[str, list[tuple[Sequence[int], Plan]]] = {}
        whole = plans
        for path, how in sites.splits.items():
            inside = [
                (mine, plan, Plan() if how.shared and f"{path}.{how.shared}" not in plan.modules else plan.within(path))
                for mine, plan in whole
            ]
            split[path] = [(mine, part) for mine, _, part in inside if part.modules or part.attention]
            whole = [(mine, plan.without(part)) for mine, plan, part in inside]
        plans, axes = whole, sites.row_axis
        paths = dict.fromkeys(path for _, plan in plans for path in plan.modules)
        modules = {
            path: Rows([(mine, plan.modules[path]) for mine, plan in plans if path in plan.modules], rows, axes(path))
            for path in paths
        }

        def spread(found: Sequence[Any]) -> list[Any]:
            """One entry a row of one entry a plan."""
            by_row = {row: each for (mine, _), each in zip(plans, found, strict=True) for row in mine}
            return [by_row.get(row) for row in range(rows)]

        layers = dict.fromkeys(path for _, plan in plans for path in plan.attention)
        attention = {path: spread([plan.attention.get(path) for _, plan in plans]) for path in layers}
        tokens = [plan.tokens for _, plan in plans]
        spread_tokens = spread(tokens) if any(each is not None for each in tokens) else None
        return cls(modules, attention, spread_tokens, rows, {path: found for path, found in split.items() if found})

    def prefix_lengths(self, stack: str) -> Sequence[int] | None:
        """How many keys stand before the real ones in a stack of layers, told by how its modules' paths begin.

        One number for all rows, or one a row; None without prefixes.
        """
        found = next((prefix for path, prefix in self.attention.items() if path.startswith(stack)), None)
        if isinstance(found, KeyValues):
            return [len(found)]
        by_row = {row: len(prefix) for row, prefix in enumerate(found or ()) if prefix is not None}
        for groups in self.split.values():
            by_row |= {row: of[0] for mine, part in groups if (of := part.prefix_lengths(stack)) for row in mine}
        return [by_row.get(row, 0) for row in range(self.rows or 0)] if by_row else None

    def within(self, path: str) -> Plan:
        """What of it acts in a module and below."""

        def chosen(where: Mapping[str, Any]) -> dict[str, Any]:
            return {at: delta for at, delta in where.items() if f"{at}.".startswith(f"{path}.")}

        return Plan(chosen(self.modules), chosen(self.attention))

    def without(self, part: Plan) -> Plan:
        """The rest."""
        modules = {path: delta for path, delta in self.modules.items() if path not in part.modules}
        attention = {path: delta for path, delta in self.attention.items() if path not in part.attention}
        return Plan(modules, attention, self.tokens)


@dataclass(eq=False)
class Execution:
    """The plan in force, and what makes the next one.

    In training the plan outlives the forward it was made for, because an activation checkpoint recomputes parts of
    that forward during backward; the next forward replaces it.
    """

    lower: Callable[[], Plan] | None = None
    plan: Plan = field(default_factory=Plan)
    depth: int = 0
    configs: Sequence[Any] = ()
    _attention: list[tuple[Any, str]] = field(default_factory=list)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook of the base: make the plan at the outermost call."""
        self.depth += 1
        if self.depth == 1:
            self.plan = self.lower() if self.lower else Plan()
            if self.plan.attention:
                self._attention = prefixes.switch_on(self.configs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Post-hook of the base, called after exceptions too."""
        self.depth -= 1
        if self.depth == 0:
            if not (module.training and torch.is_grad_enabled()):
                self.plan = Plan()
            prefixes.switch_off(self._attention)
            self._attention = []

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
    def part(self, plan: Plan) -> Iterator[None]:
        """Have the modules called inside the block act by another plan."""
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before

    @contextlib.contextmanager
    def _with_plan(self, plan: Plan) -> Iterator[None]:
        before, self.plan = self.plan, plan
        switched = prefixes.switch_on(self.configs) if plan.attention else []
        try:
            yield
        finally:
            prefixes.switch_off(switched)
            self.plan = before


def install(execution: Execution, roots: Iterable[nn.Module]) -> list[Any]:
    """Hook the modules whose forward starts a step."""
    handles: list[Any] = []
    for root in roots:
        handles.append(root.register_forward_pre_hook(execution.enter))
        handles.append(root.register_forward_hook(execution.leave, always_call=True))
    return handles
