"""What other people's trainers ask of a model, answered by an adapter.

transformers', TRL's and accelerate's trainers take an adapter for the model. Some of what they ask concerns the base
(its generation config, its output projection), some has to run with the adapter (the backbone, which TRL calls by
itself to compute log-probabilities without all logits).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.adapters.base import Base

_OF_THE_BASE = ("add_model_tags", "dtype", "generation_config", "get_output_embeddings", "warnings_issued")


class Backbone(nn.Module):
    """What transformers calls a model's ``base_model``: run without the head. It owns nothing."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base without its head, with the adapter."""
        return self.run(*args, **kwargs)


class Trainable(nn.Module):
    """The side of an adapter that trainers see."""

    base: Base

    def __getattr__(self, name: str) -> Any:
        """What trainers ask of a model and the adapter has not is the base's."""
        return getattr(self.base.model, name) if name in _OF_THE_BASE else super().__getattr__(name)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.base.checkpointing

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, *, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """As `Base.enable_checkpointing`; how activations are recomputed is settled by that.

        Raises:
            AdapterError: only some layers, or offloading, is asked for, or the architecture cannot do it.
        """
        if every_n_layers != 1 or offload:
            raise AdapterError(
                "With an adapter, activation checkpointing is of all layers and without offloading; "
                "leave every_n_layers and offload out."
            )
        self.base.enable_checkpointing()

    def activation_checkpointing_disable(self) -> None:
        """Undo it."""
        self.base.disable_checkpointing()

    # The names transformers had for it before its version 5.
    is_gradient_checkpointing = is_activation_checkpointing
    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable
