"""What a method is: a configuration, the parameters it needs at each site, and their lowering to deltas."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta


@dataclass(frozen=True)
class Lowering:
    """What `Method.lower` may want to know about the step it lowers for.

    Attributes:
        training: whether the adapter is in training mode.
        dtype: what the base computes in.
    """

    training: bool
    dtype: torch.dtype


class Method(BaseModel):
    """A PEFT technique. Its fields are its hyper-parameters; unknown ones are an error.

    A subclass in `veneer.methods` is found by its `name` without being listed anywhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: ClassVar[str]
    """What configs call it."""
    summary: ClassVar[str]
    """One line for `veneer methods`: what it is, when to use it."""
    learning_rate: ClassVar[float]
    """A default that learns."""
    peft_type: ClassVar[str]
    """Its ``peft_type`` in ``adapter_config.json``: peft's own wherever peft has the method."""
    peft_names: ClassVar[Mapping[str, str]] = {}
    """peft's spelling of a field -> ours."""

    @abstractmethod
    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """Where it acts in this base."""

    @abstractmethod
    def parameters(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Initial values of its trainable parameters at a site, float32, by name."""

    @abstractmethod
    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The delta these parameters amount to; differentiable, evaluated once a step."""

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """Its fields for ``adapter_config.json``, in peft's spelling, when it acts at ``sites`` of ``site_map``."""
        ours = {name: theirs for theirs, name in self.peft_names.items()}
        return {ours.get(key, key): value for key, value in self.model_dump(mode="json").items()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The method an ``adapter_config.json`` describes.

        Raises:
            AdapterFileError: it asks for something this method does not do.
        """
        return cls(**{ours: config[theirs] for theirs, ours in cls.peft_names.items() if theirs in config})
