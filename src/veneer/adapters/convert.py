"""One method's adapter as another's that computes the same, or nearly."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from veneer.adapters.adapter import Adapter
from veneer.bases.weights import parameters_of
from veneer.errors import AdapterError
from veneer.methods import Method


def converted(
    adapter: Adapter, to: type[Method], name: str, rank: int | None = None
) -> tuple[Adapter, Mapping[str, float]]:
    """Attach an adapter of method ``to`` that does what ``adapter`` does; its head comes along.

    Args:
        adapter: any, attached to its base.
        to: what to write it as.
        name: what to call the new adapter.
        rank: to approximate to where that is needed; None for exact conversions only.

    Returns:
        The new adapter, and for each map the relative error of its change (0 where exact).

    Raises:
        AdapterError: it can't be written as that, and why.
    """
    base, heads = adapter.base, adapter.modules_in_full
    deltas = {path: delta for path, delta in adapter.lower(training=False).items() if path not in heads}
    if not deltas:
        raise AdapterError(f"{adapter.method.name} changes nothing of the base that could be written as {to.name}.")
    sites = {site.path: site for site in base.sites.everything if site.path in deltas}
    if odd := sorted(set(deltas) - set(sites)):
        where = odd[0] or "the whole model"
        raise AdapterError(f"{adapter.method.name} acts at {where}, which is no map whose weight could be changed.")
    found = {sites[path]: (delta, parameters_of(base.model.get_submodule(path))) for path, delta in deltas.items()}
    method, values, errors = to.of_deltas(found, rank)
    own_heads = {path: {key: value.detach().clone() for key, value in head.items()} for path, head in heads.items()}
    new = base.attach(method, name, modules=own_heads, task=adapter.task)
    with torch.no_grad():
        for path, tensors in values.items():
            for key, value in new.parameters_at(path).items():
                value.copy_(tensors[key])
    origin = {"name": adapter.method.name, **adapter.method.model_dump(mode="json")}
    new.record = {**adapter.record, "converted_from": origin}
    return new, errors
