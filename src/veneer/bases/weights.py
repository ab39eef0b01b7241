"""Weights the right way round: deltas know ``[out, in]``; GPT-2's ``Conv1D`` stores ``[in, out]``.

Maps kept as bare parameters differ more: XLNet's have an axis for the heads, those of experts one for the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from veneer.bases.factored import FactoredLinear
from veneer.bases.quantized import weight_behind

if TYPE_CHECKING:
    from veneer.bases.site import Site


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters by name, the weight as ``[out, in]``; of a factored map, the product of its factors, of
    a quantised one, what it stands for."""
    if isinstance(module, FactoredLinear):
        own = {"weight": module.weight, "bias": module.bias}
        return {name: value for name, value in own.items() if value is not None}
    found: dict[str, Tensor] = {name: value for name, value in module._parameters.items() if value is not None}
    if (weight := weight_behind(module)) is not None:
        found["weight"] = weight
    return stored(module, found)


def stored(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters the way round the module stores them (its own inverse)."""
    if is_transposed(module) and "weight" in values:
        return {**values, "weight": values["weight"].mT}
    return dict(values)


def put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a module a parameter in place of its own, or of the factors it keeps a weight as."""
    if isinstance(module, FactoredLinear) and name == "weight":
        module.be_dense(parameter)
    else:
        module._parameters[name] = parameter


def weight_of(site: Site, value: Tensor) -> Tensor:
    """The value of a bare parameter as the weight ``[out, in]``, of experts ``[experts, out, in]``."""
    matrix = value if site.count else value.flatten(1)
    return matrix.mT if site.transposed else matrix


def bare(site: Site, weight: Tensor, like: Tensor) -> Tensor:
    """The inverse of `weight_of`, in the shape of ``like``."""
    return (weight.mT if site.transposed else weight).reshape(like.shape)


def parameters_at(model: nn.Module, site: Site) -> dict[str, Tensor]:
    """The base's own parameters at a site by name, weights as ``[…, out, in]``; of the whole model all there are, as
    it stores them, tied ones once."""
    if site.path == "":
        own = set(model.state_dict(keep_vars=True))  # without those of adapters
        return {name: value for name, value in model.named_parameters() if name in own}
    found = parameters_of(model.get_submodule(site.module))
    return found if site.parameter is None else {"weight": weight_of(site, found[site.parameter])}
