"""Plans: the deltas of a step, by where they act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.bases import SiteMap
from veneer.deltas import Among, Delta, KeyValues, Rows, Stack, Tokens
from veneer.errors import AdapterError

ByRow = Sequence[Delta | None]
"""A delta for each row of the batch, or none."""


@dataclass(frozen=True)
class Plan:
    """Deltas by where they act.

    Attributes:
        modules: around modules, by path.
        attention: keys and values in attention modules, by path; a list is by rows.
        tokens: virtual tokens before the input; a list is by rows.
        rows: how many rows the batch has, if the plan is by rows. Every sequence above has as many entries.
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
        modules: dict[str, Delta] = {}
        attention: dict[str, KeyValues] = {}
        tokens: Tokens | None = None
        for path, delta in deltas.items():
            around: list[Delta] = []
            for part in delta.flat if isinstance(delta, Stack) else [delta]:
                if isinstance(part, KeyValues):
                    attention[path] = attention[path] + part if path in attention else part
                elif isinstance(part, Tokens):
                    tokens = tokens + part if tokens else part
                else:
                    around.append(part)
            if around:
                modules[path] = Stack(around) if len(around) > 1 else around[0]
        return cls(modules, attention, tokens)

    @classmethod
    def by_rows(cls, plans: Sequence[tuple[Sequence[int], Plan]], rows: int, sites: SiteMap) -> Plan:
        """Of several adapters, each for some rows of a base with these sites.

        Raises:
            AdapterError: one of them runs the whole model on parameters of its own, and others are there.
        """
        if any(plan.whole for _, plan in plans):
            if len(plans) == 1 and len(plans[0][0]) == rows:
                return plans[0][1]
            raise AdapterError(
                "An adapter that replaces all of the base's parameters (full fine-tuning) shares nothing with other "
                "rows; give its rows a batch of their own."
            )
        split: dict[str, list[tuple[Sequence[int], Plan]]] = {}
        whole = plans
        for path, how in sites.splits.items():
            inside = [
                (mine, plan, Plan() if how.shared and f"{path}.{how.shared}" not in plan.modules else plan.within(path))
                for mine, plan in whole
            ]
            split[path] = [(mine, part) for mine, _, part in inside if part.modules or part.attention]
            whole = [(mine, plan.without(part)) for mine, plan, part in inside]
            split[path] = [(mine, part.for_rows(Among(mine, rows, None))) for mine, part in split[path]]
        plans, axes = whole, sites.row_axis
        paths = dict.fromkeys(path for _, plan in plans for path in plan.modules)
        modules = {
            path: Rows(
                [
                    (mine, plan.modules[path].for_rows(Among(mine, rows, axes(path))))
                    for mine, plan in plans
                    if path in plan.modules
                ],
                rows,
                axes(path),
            )
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

    @property
    def whole(self) -> Delta | None:
        """What acts on all of the model's parameters at once."""
        return self.modules.get("")

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

    def for_rows(self, among: Among) -> Plan:
        """The same for some rows of a batch."""
        return replace(self, modules={path: delta.for_rows(among) for path, delta in self.modules.items()})

    def without(self, part: Plan) -> Plan:
        """The rest."""
        modules = {path: delta for path, delta in self.modules.items() if path not in part.modules}
        attention = {path: delta for path, delta in self.attention.items() if path not in part.attention}
        return Plan(modules, attention, self.tokens)
