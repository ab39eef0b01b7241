"""A batch whose rows are under different deltas, or none.

    y_i  ←  δ_{a(i)}(x_i, y_i)        for each row i with an adapter a(i); the other rows are not touched

Deltas of one form act together where the form knows how (`Delta.mixed`), else group by group. A delta that needs
the module to run on other parameters has it run again, on its own rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.deltas.base import Delta
from veneer.errors import AdapterError

Rerun = Callable[[Delta, Tensor], Tensor]
"""Runs the module on a delta's effective parameters, without hooks: (delta, x) → y."""


@dataclass(frozen=True, eq=False)
class Rows(Delta):
    """Deltas by rows.

    Args:
        groups: which rows each delta is for.
        count: how many rows the batch has.
        axis: of the batch, in what the module sees.
    """

    groups: Sequence[tuple[Sequence[int], Delta]]
    count: int
    axis: int = 0

    def before(self, x: Tensor) -> Tensor:
        """Each group's own change of the input."""
        return self._each(x, lambda delta, rows: delta.before(rows))

    def apply_rows(self, x: Tensor, y: Tensor, rerun: Rerun) -> Tensor:
        """Each group's own change of the output; ``x`` is the input before `before`."""
        out = y.transpose(0, self.axis)
        times = runs(x, self.axis, self.count)
        x = x.transpose(0, self.axis)
        changed: list[tuple[Tensor, Tensor]] = []
        for rows, delta in self._together(times, out.device):
            mine, there = x.index_select(0, rows), out.index_select(0, rows)
            if delta.swaps:
                there = rerun(delta, delta.before(mine).transpose(0, self.axis)).transpose(0, self.axis)
            changed.append((rows, delta.apply(mine, there)))
        for rows, new in changed:
            if new.shape[1:] != out.shape[1:]:  # heads of the adapters' own, for other labels than the base's
                out = _wide_enough(out, changed)
            out = out.index_copy(0, rows, new)
        return out.transpose(0, self.axis)

    def _each(self, x: Tensor, change: Callable[[Delta, Tensor], Tensor]) -> Tensor:
        if all(type(delta).before is Delta.before for _, delta in self.groups):
            return x
        out = x.transpose(0, self.axis)
        for rows, delta in self._together(runs(x, self.axis, self.count), out.device):
            if not delta.swaps:
                out = out.index_copy(0, rows, change(delta, out.index_select(0, rows)))
        return out.transpose(0, self.axis)

    def _together(self, times: int, device: torch.device) -> Sequence[tuple[Tensor, Delta]]:
        """Groups as row indices and deltas, those of one form as one where the form can."""
        forms: dict[type[Delta], list[tuple[Sequence[int], Delta]]] = {}
        for rows, delta in self.groups:
            forms.setdefault(type(delta), []).append((rows, delta))
        result: list[tuple[Tensor, Delta]] = []
        for form, groups in forms.items():
            indices = [repeated(rows, times, device) for rows, _ in groups]
            if len(groups) > 1:
                which = torch.cat([torch.full_like(index, n) for n, index in enumerate(indices)])
                together = form.mixed([delta for _, delta in groups], which)
                if together is not None:
                    result.append((torch.cat(indices), together))
                    continue
            result += zip(indices, (delta for _, delta in groups), strict=True)
        return result


def _wide_enough(y: Tensor, changed: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Room for outputs of another width than the module's own."""
    widths = {tuple(new.shape[1:]) for _, new in changed}
    if len(widths) > 1 or sum(len(rows) for rows, _ in changed) < len(y):
        raise AdapterError(
            "Rows of one batch are under heads with different numbers of outputs, which is no one tensor; put rows "
            "with the same number of labels into a batch."
        )
    return y.new_empty(len(y), *widths.pop())


def runs(x: Tensor, axis: int, count: int) -> int:
    """How many times each of ``count`` rows comes in a run along an axis of ``x``: once, or once a position where rows
    and positions are flattened into one axis.

    Raises:
        AdapterError: the axis is not one of these rows.
    """
    seen = x.shape[axis]
    if seen == count:
        return 1
    if x.dim() == 2 and x.is_floating_point() and seen % count == 0:
        return seen // count
    raise AdapterError(
        f"Adapters are given for {count} rows, but a module sees a batch of {seen}. (Where a base computes something "
        "once for all rows, adapters can't differ there: give all rows the same, or leave that module out.)"
    )


def repeated(rows: Sequence[int], times: int, device: torch.device) -> Tensor:
    """Indices of these rows where each row of the batch comes ``times`` times in a run."""
    index = torch.tensor(rows, device=device)
    return (index[:, None] * times + torch.arange(times, device=device)).flatten() if times > 1 else index
