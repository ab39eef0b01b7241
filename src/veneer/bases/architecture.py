"""A base without its weights: what is known of a model before it is loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from veneer.bases.catalogue import CATALOGUE
from veneer.bases.known import KNOWN
from veneer.bases.loading import default_auto_class, locate
from veneer.bases.quiet import quiet
from veneer.errors import BaseError, FetchError, did_you_mean
from veneer.packages import offline as no_network

_DEPTHS = (
    "num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
"""What configs call how many layers there are."""


@dataclass(frozen=True)
class Architecture:
    """A model's config and class.

    Attributes:
        name: what was asked for.
        config: transformers'.
        auto_class: the transformers auto class it is built with.
        dtype: its weights are published in.
        own_head: whether its output projection is not the embedding, though the architecture ties them.
    """

    name: str
    config: Any
    auto_class: str
    dtype: torch.dtype
    own_head: bool = False

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model on whatever device is the default now; on ``meta``, or on shapes alone, at once and for nothing."""
        import transformers

        with quiet():
            model: nn.Module = getattr(transformers, self.auto_class).from_config(
                copy.deepcopy(self.config), dtype=dtype or self.dtype
            )
        if self.own_head and (head := model.get_output_embeddings()) is not None:  # type: ignore[operator]
            head.weight = nn.Parameter(torch.empty_like(head.weight))
        return model

    @cached_property
    def parameters(self) -> int:
        """How many numbers it has, shared ones once."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())

    @property
    def kind(self) -> str:
        """``decoder``, ``encoder`` or ``encoder-decoder``."""
        if getattr(self.config, "is_encoder_decoder", False):
            return "encoder-decoder"
        return "decoder" if self.auto_class == "AutoModelForCausalLM" else "encoder"

    @property
    def layers(self) -> int:
        """How deep it is (an encoder-decoder: each half)."""
        return max((value for name in _DEPTHS if isinstance(value := getattr(self.config, name, None), int)), default=0)

    @property
    def period(self) -> int:
        """After how many layers the kinds of layers come again."""
        kinds: Sequence[str] = getattr(self.config, "layer_types", None) or ()
        fits = (n for n in range(1, len(kinds)) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
        return next(fits, 1)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it tells apart."""
        return getattr(self.config, "vocab_size", None)

    @property
    def positions(self) -> int | None:
        """Tokens a row has at most, where that is bounded. Bounds are round; what is above (RoBERTa's 514) is not for
        tokens."""
        bound = getattr(self.config, "max_position_embeddings", None)
        return bound - bound % 8 if isinstance(bound, int) and bound > 0 else None

    def with_layers(self, count: int) -> Architecture:
        """The same with fewer layers."""
        config = copy.deepcopy(self.config)
        for name in _DEPTHS:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, count)
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:count]
        return replace(self, config=config)


def architecture(
    name: str | os.PathLike[str], *, auto_class: str | None = None, revision: str | None = None
) -> Architecture:
    """What a base is, from its config alone; of a well-known one, from its sizes.

    Args:
        name: a hub id, a folder, a ``.gguf`` file, a catalogue name, or a name in `veneer.bases.known`.
        auto_class: the transformers auto class to build it with; by default the one the checkpoint was saved as.
        revision: of a hub id.

    Raises:
        BaseError: the name leads to nothing.
    """
    import transformers

    text = str(name)
    known = KNOWN.get(text.rpartition("/")[2].lower()) if not os.path.exists(text) else None
    if known is not None and not (text in CATALOGUE and CATALOGUE[text].cached):
        config = transformers.AutoConfig.for_model(known.model_type, **known.settings)
        dtype = getattr(torch, known.dtype)
        return Architecture(text, config, auto_class or known.auto_class, dtype, known.own_head)
    try:
        source, where = locate(text, revision, no_network(None))
        with quiet():
            config = transformers.AutoConfig.from_pretrained(source, **where)
    except (OSError, ValueError, KeyError, FetchError) as error:
        if isinstance(error, BaseError):
            raise
        names = sorted({row.name for row in KNOWN.values()})
        raise BaseError(
            f"No base called {text!r}: it is no folder here, not among those known by their sizes, and no config of it "
            f"can be had from the hub.{did_you_mean(text.rpartition('/')[2].lower(), [*CATALOGUE, *KNOWN])} "
            f"Known: {', '.join(names)}."
        ) from error
    dtype = getattr(config, "dtype", None) or torch.float32
    return Architecture(text, config, auto_class or default_auto_class(config), dtype)
