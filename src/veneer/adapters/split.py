"""Modules whose rows can't be mixed inside: run again for each group of rows, on those rows alone.

DeBERTa projects (and may normalise) relative positions once for all rows; XLNet's attention and stacks of experts
keep their maps as bare parameters. The module's own call computes the plain base for every row; each group's rows are
then replaced by those of a call under the group's own plan.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.execution import Execution
from veneer.bases.families import Split
from veneer.deltas.rows import repeated, runs


class SplitHooks:
    """The hook of one such module."""

    def __init__(self, path: str, split: Split, execution: Execution) -> None:
        self.path = path
        self.split = split
        self.execution = execution

    def install(self, module: nn.Module) -> list[Any]:
        """Register the hook; the handle removes it again."""
        return [module.register_forward_hook(self.rerun, with_kwargs=True)]

    def rerun(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the rows of each group that has an adapter here."""
        plan = self.execution.plan
        if (groups := plan.split.get(self.path)) is None or plan.rows is None:
            return None
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        given, axes = bound.arguments, self.split.inputs
        name, axis = next((name, axis) for name, axis in axes.items() if given.get(name) is not None)
        seen, device = given[name].shape[axis], given[name].device
        times = runs(given[name], axis, plan.rows)
        for rows, part in groups:
            index = repeated(rows, times, device)
            mine = {
                name: value.index_select(axes[name], index)
                if name in axes and isinstance(value, Tensor) and value.shape[axes[name]] == seen
                else value
                for name, value in given.items()
            }
            with self.execution.part(part):
                new = module(**mine)
            output = _placed(output, new, index, self.split.output)
        return output


def _placed(output: Any, new: Any, index: Tensor, axis: int) -> Any:
    """``output`` with the rows at ``index`` replaced, in each of its tensors."""
    if isinstance(output, dict):  # transformers' outputs
        return type(output)(**{name: _placed(old, new[name], index, axis) for name, old in output.items()})
    if isinstance(output, tuple):
        return tuple(_placed(old, each, index, axis) for old, each in zip(output, new, strict=True))
    return output.index_copy(axis, index, new) if isinstance(output, torch.Tensor) else output
