"""Linear maps kept as two thin ones, W = U V, and models that have such maps.

A factored map is one linear map to everyone else: it has a ``weight``, the product, and adapters act on the whole of
it; merging an adapter into it makes it dense. The folder of a model with such maps is an ordinary one, but for

    config.json                     "veneer_ranks": path in the backbone -> rank
    model.factored.safetensors      instead of model.safetensors: ``PATH.U`` ``[out, r]`` and ``PATH.V`` ``[r, in]``

so that transformers alone says that it finds no weights, where it would otherwise fill the maps with random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

RANKS = "veneer_ranks"
"""The config's entry: path of a map in the backbone -> its rank."""
VARIANT = "factored"
"""What transformers calls a different set of weights."""


def is_factored(model: nn.Module) -> bool:
    """Whether any of its maps is kept as two."""
    return any(isinstance(module, FactoredLinear) for module in model.modules())


class FactoredLinear(nn.Linear):
    """``y = (x Vᵀ) Uᵀ + b``.

    Args:
        linear: the map whose place it takes, for its sizes, its dtype, its device and its bias.
        rank: r of U ``[out, r]`` and V ``[r, in]``, which are left as they come.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        like = linear.weight
        self.U = nn.Parameter(like.new_empty(self.out_features, rank), requires_grad=like.requires_grad)
        self.V = nn.Parameter(like.new_empty(rank, self.in_features), requires_grad=like.requires_grad)
        self._parameters["bias"] = linear.bias
        self._parameters["weight"] = None  # the place of one that is swapped in

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``[out, in]``: the product, or what took its place."""
        own = self._parameters["weight"]
        return own if own is not None else self.U @ self.V

    def forward(self, x: Tensor) -> Tensor:
        """Both maps, one after the other; the one in their place, if there is one."""
        if (dense := self._parameters["weight"]) is not None:
            return F.linear(x, dense, self.bias)
        return F.linear(F.linear(x, self.V), self.U, self.bias)

    def be_dense(self, weight: nn.Parameter) -> None:
        """Be an ordinary map with this weight from now on."""
        self._parameters.update(weight=weight, U=None, V=None)

    def extra_repr(self) -> str:
        """Sizes and rank."""
        rank = self.U.shape[1] if self.U is not None else None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={rank}"


def ranks_of(backbone: nn.Module) -> dict[str, int]:
    """The ranks of its factored maps, by path."""
    maps = {path: module for path, module in backbone.named_modules() if isinstance(module, FactoredLinear)}
    return {path: module.U.shape[1] for path, module in maps.items() if module.U is not None}


def install(backbone: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put empty factored maps into the places of ordinary ones."""
    for path, rank in ranks.items():
        parent, _, name = path.rpartition(".")
        linear = backbone.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        setattr(backbone.get_submodule(parent), name, FactoredLinear(linear, rank))


def load(auto_class: Any, source: str, settings: Any, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model of this config from a folder with factored maps, and what `from_pretrained` tells of its loading."""
    from veneer.bases.sites import backbone

    plain = auto_class._model_mapping[type(settings)]
    plain = plain[0] if isinstance(plain, tuple) else plain

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, *args, **kwargs)
        install(backbone(self), getattr(settings, RANKS))
        self.__class__ = plain  # only its building was different

    building: Any = type(plain.__name__, (plain,), {"__init__": build})
    loaded: tuple[nn.Module, dict[str, Any]] = building.from_pretrained(
        source, variant=VARIANT, output_loading_info=True, **options
    )
    return loaded


def write(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a transformers model, with factored maps or without, and its tokenizer."""
    from veneer.bases.sites import backbone

    ranks, config = ranks_of(backbone(model)), model.config
    config.__dict__.pop(RANKS, None)
    if ranks:
        setattr(config, RANKS, ranks)
    model.save_pretrained(folder, variant=VARIANT if ranks else None)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
