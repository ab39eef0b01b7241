"""A look at the data before the first step, for methods that want one (`Method.surveys`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from veneer.adapters import Adapter
from veneer.bases import Site
from veneer.bases.weights import stored, weight_of
from veneer.tasks import Prepared, Task
from veneer.training.progress import console
from veneer.training.settings import TrainSettings


def survey(adapter: Adapter, task: Task, prepared: Prepared, settings: TrainSettings) -> None:
    """Show the adapter's method the rows it is about to learn from, if it wants to see them and has not yet."""
    if adapter.unsurveyed:
        method = adapter.method
        who = method.lookers
        console.print(f"{' and '.join(who)} look{'s' if len(who) == 1 else ''} at the data before the first step")
        adapter.survey(RowSurvey(adapter, task, prepared, settings.batch_size, settings.seed))
        tell_trained(adapter)


def tell_trained(adapter: Adapter) -> None:
    """Print how much is trained, now that a look at the data has decided it."""
    told = f"{adapter.trainable:,} numbers ({adapter.trainable_share:.2%} of the base)"
    console.print(f"{adapter.method.name} now trains {told}")


class RowSurvey:
    """`veneer.methods.Survey` of prepared rows, in an order the seed decides.

    Args:
        adapter: what is to be trained, as it starts out.
        task: what for.
        prepared: the rows.
        batch_size: of forwards without gradients.
        seed: of the order.
    """

    def __init__(self, adapter: Adapter, task: Task, prepared: Prepared, batch_size: int, seed: int) -> None:
        self.adapter, self.task, self.batch_size = adapter, task, batch_size
        self.examples = prepared.examples
        self.order = torch.randperm(len(prepared.examples), generator=torch.Generator().manual_seed(seed)).tolist()

    def gradients(self, sites: Sequence[Site], examples: int) -> Iterator[Mapping[str, Tensor]]:
        """∂ −log p(y | x) / ∂ W of single examples."""
        model = self.adapter.base.model
        weights = [model.get_submodule(site.module)._parameters[site.parameter or "weight"] for site in sites]
        for batch in self._batches(examples, 1):
            for weight in weights:
                weight.requires_grad_(True)  # type: ignore[union-attr]
            try:
                found = torch.autograd.grad(self.task.outcome(self.adapter, batch).loss, weights, allow_unused=True)  # type: ignore[arg-type]
            finally:
                for weight in weights:
                    weight.requires_grad_(False)  # type: ignore[union-attr]
            yield {
                site.path: _as_weight(site, model, gradient)
                for site, gradient in zip(sites, found, strict=True)
                if gradient is not None
            }

    def inputs(self, sites: Sequence[Site], examples: int) -> Iterator[Mapping[str, Tensor]]:
        """What the maps are given, ``[tokens, in]``."""
        base = self.adapter.base
        seen: dict[str, list[Tensor]] = {}

        def keep(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(path, []).append(_real(args[0].detach(), mask, base.sites.row_axis(path)))

        for batch in self._batches(examples, self.batch_size):
            mask = batch.get("attention_mask")
            seen.clear()
            handles = [
                base.model.get_submodule(site.path).register_forward_pre_hook(partial(keep, site.path))
                for site in sites
            ]
            try:
                with torch.no_grad():
                    self.task.outcome(self.adapter, batch)
            finally:
                for handle in handles:
                    handle.remove()
            yield {path: torch.cat(parts) for path, parts in seen.items()}

    def _batches(self, examples: int, size: int) -> Iterator[dict[str, Tensor]]:
        """Batches of the first so many examples, on the base's device, with the base out of training."""
        chosen = self.order[:examples]
        training = self.adapter.training
        self.adapter.eval()
        try:
            starts = range(0, len(chosen), size)
            for start in track(starts, "survey", console=console, transient=True, disable=not console.is_terminal):
                rows = [self.examples[index] for index in chosen[start : start + size]]
                batch = self.task.collate(rows, self.adapter.base.tokenizer)
                yield {name: value.to(self.adapter.device) for name, value in batch.items()}
        finally:
            self.adapter.train(training)


def _as_weight(site: Site, model: nn.Module, value: Tensor) -> Tensor:
    if site.parameter is not None:
        return weight_of(site, value)
    return stored(model.get_submodule(site.path), {"weight": value})["weight"]


def _real(x: Tensor, mask: Tensor | None, row_axis: int) -> Tensor:
    """A map's inputs as ``[tokens, in]``, without those at padding where it sees a sequence as it went in."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if mask is None or mask.numel() != len(rows):
        return rows
    return rows[(mask.T if row_axis else mask).flatten().bool()]
