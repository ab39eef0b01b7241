"""Folding an adapter into a copy of its base's weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.bases.families import is_never_called
from veneer.bases.quantized import restore
from veneer.bases.sites import input_embedding_of
from veneer.bases.weights import parameters_at, parameters_of, put, stored
from veneer.deltas import Delta
from veneer.errors import AdapterError, VeneerWarning

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter


def merged(adapter: Adapter) -> nn.Module:
    """A copy of the base model, unquantised, with the adapter in its weights; what was tied stays so where it can.

    Raises:
        AdapterError: it cannot be merged.
    """
    plan = adapter.lower(training=False)
    base = copy.deepcopy(adapter.base)
    for name in base.adapters:
        base.detach(name)
    tied = _is_tied(base.model)
    if base.quantized:
        restore(base.model)
    if (whole := plan.pop("", None)) is not None:
        _merge_whole(base.model, whole, parameters_at(base.model, base.sites.whole))
    new: dict[nn.Parameter, nn.Parameter] = {}
    for path, delta in plan.items():
        try:
            _merge_at(base.model.get_submodule(path), delta, new)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error} Keep the adapter beside the base instead.") from error
    _replace_uncalled(base.model, new)
    if tied and not _is_tied(base.model):
        base.model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    if adapter.base.quantized:
        warnings.warn(
            f"The base is quantised ({adapter.base.quantized}); the adapter was merged into the weights that stands "
            "for, and the merged model is not quantised. Quantising it again rounds the adapter's changes, many of "
            "which are smaller than a step of the grid: they can be lost. Measure it, or keep the adapter apart.",
            VeneerWarning,
            stacklevel=3,
        )
    return base.model


def _merge_at(module: nn.Module, delta: Delta, new: dict[nn.Parameter, nn.Parameter]) -> None:
    """Change a module's parameters; ``new`` says what became of which."""
    for name, value in stored(module, delta.merge_into(parameters_of(module))).items():
        old = getattr(module, name)
        own = value.clone(memory_format=torch.contiguous_format)  # it may be the adapter's, which trains on
        twin = new.setdefault(old, nn.Parameter(own, requires_grad=old.requires_grad))
        same = torch.equal(twin, own)  # what was tied and is changed alike stays tied
        put(module, name, twin if same else nn.Parameter(own, requires_grad=old.requires_grad))


def _replace_uncalled(model: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Have modules that only hold what others use (T5's shared table) hold the new values, too."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter in new and is_never_called(path):
                module._parameters[name] = new[parameter]


def _merge_whole(model: nn.Module, delta: Delta, own: Mapping[str, Tensor]) -> None:
    """Write what a delta of all parameters makes of them into them, so that what is tied stays tied."""
    with torch.no_grad():
        for name, value in delta.merge_into(own).items():
            own[name].copy_(value)


def _is_tied(model: nn.Module) -> bool:
    """Whether the output projection has the input embedding's weight."""
    into, out = input_embedding_of(model), getattr(model, "get_output_embeddings", lambda: None)()
    return into is not None and out is not None and into.weight is out.weight
