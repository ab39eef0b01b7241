"""What can be adapted of one module."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from veneer.bases.families import bare_maps, role_of
from veneer.bases.site import EMBEDDING, EXPERTS, Site
from veneer.bases.weights import is_transposed

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def sites_of(path: str, module: nn.Module) -> Iterator[Site]:
    """What can be adapted of this very module."""
    layer_match = _LAYER.search(path)
    layer = int(layer_match[1]) if layer_match else None
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear) or is_transposed(module):
        role, group = role_of(path)
        if isinstance(module, nn.Linear):
            width = (module.in_features, module.out_features)
        else:
            width = tuple(module._parameters["weight"].shape)  # type: ignore[union-attr]
        yield Site(path, *width, "linear", role, group, layer, bias)
    elif isinstance(module, nn.Embedding):
        yield Site(path, module.num_embeddings, module.embedding_dim, EMBEDDING, None, None, layer)
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        kernel = tuple(module.kernel_size)
        channels = module.in_channels // module.groups
        yield Site(path, channels, module.out_channels, "conv", None, None, layer, bias, kernel)
    elif (scale := module._parameters.get("weight")) is not None:
        # Norms over the last axis only: those over channels come before it.
        if scale.dim() == 1 and type(module).__name__.endswith(("LayerNorm", "RMSNorm")):
            yield Site(path, len(scale), len(scale), "norm", None, None, layer, bias)
    else:
        yield from _bare(path, module, layer)


def _bare(path: str, module: nn.Module, layer: int | None) -> Iterator[Site]:
    """Linear maps that the module keeps as parameters of its own."""
    for name, transposed in bare_maps(module).items():
        shape = module._parameters[name].flatten(1).shape  # type: ignore[union-attr]
        width = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
        role, group = role_of(f"{path}.{name}")
        yield Site(
            f"{path}.{name}", width[0], width[1], "linear", role, group, layer, parameter=name, transposed=transposed
        )
    if type(module).__name__.endswith("Experts"):
        transposed = bool(getattr(module, "is_transposed", False))
        for name, value in module._parameters.items():
            if value is not None and value.dim() == 3:
                width = (value.shape[1], value.shape[2]) if transposed else (value.shape[2], value.shape[1])
                yield Site(
                    f"{path}.{name}", width[0], width[1], EXPERTS, None, EXPERTS, layer,
                    parameter=name, transposed=transposed, count=len(value),
                )  # fmt: skip
