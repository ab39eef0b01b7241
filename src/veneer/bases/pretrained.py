"""A pretrained model, its tokenizer, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.bases.fingerprint import fingerprint
from veneer.bases.quantized import held, kind_of, numbers
from veneer.bases.sites import SiteMap, backbone
from veneer.errors import BaseError


class Pretrained:
    """A model with its tokenizer and its origin.

    Args:
        model: any PyTorch module; transformers models are what everything is tried with.
        tokenizer: its tokenizer, or None where there is none.
        name: what to write into an adapter's files so that others find this base: a hub id, a path, or a
            catalogue name. Taken from the model's config when not given.
        revision: the hub revision, where there is one.
        folder: the local folder or file the weights were read from, if they were read unchanged.
        missing: names of parameters the checkpoint lacked, so that they hold random values.
        original: loads the model as it was before it was quantised.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        folder: Path | None = None,
        missing: Collection[str] = (),
        original: Callable[[], nn.Module] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise BaseError(
                f"A base is a PyTorch module, not {type(model).__name__}; load one with veneer.load_base(name)."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        self.revision = revision
        self.folder = folder
        self.missing = frozenset(missing)
        self.original = original
        self._keep_head_input_contiguous()

    @cached_property
    def sites(self) -> SiteMap:
        """Where a delta can act."""
        return SiteMap(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Tells this backbone's architecture and weights from any other's, whatever dtype they are loaded in, and
        whether or not they were quantised in loading."""
        load = self.original
        return fingerprint(self.backbone, self.folder, self.missing, (lambda: backbone(load())) if load else None)

    @property
    def quantized(self) -> str | None:
        """How its linear maps are quantised (``nf4``, ``int8``); None if they aren't."""
        return next((kind for p in self.model.parameters() if (kind := kind_of(p)) is not None), None)

    @property
    def backbone(self) -> nn.Module:
        """The model without its head (the model itself where transformers names no backbone)."""
        return backbone(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def parameter_count(self) -> int:
        """Parameters of the base alone, shared ones counted once."""
        return sum(numbers(parameter) for parameter in self._own_parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of the base's parameters alone, shared ones counted once, with what quantised ones need besides."""
        return sum(held(parameter) for parameter in self._own_parameters())

    def _own_parameters(self) -> list[nn.Parameter]:
        """Without those of adapters, which stay out of the state dict; shared ones once."""
        own = set(self.model.state_dict(keep_vars=True))
        return [parameter for name, parameter in self.model.named_parameters() if name in own]

    def _keep_head_input_contiguous(self) -> None:
        """Generation hands the head a strided slice, on which a bf16 product on CPU is 200× slower."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is not None and _contiguous not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])
