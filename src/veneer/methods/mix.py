"""Any list of methods as one adapter.

    δ = δ_n ∘ … ∘ δ_1        at each module where several act, in the order given; elsewhere each alone

Trained and stored: what the methods train and store. Starts equal to the base where all of them do; merges where all
of them do.

Use it to join a method that steers attention with one that changes the feed-forward, or small ones that reach different
parameters (``bitfit`` and ``norm``); don't expect two that do the same to be better than one twice the size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from veneer.methods.base import BaseWeights, Method
from veneer.methods.mixture import Mixture


def _method(value: Any) -> Method:
    from veneer.methods.registry import method_from_config

    return method_from_config(value)


def _plain(method: Method) -> dict[str, Any]:
    return {"name": method.name, **method.model_dump(mode="json")}


Member = Annotated[Method, BeforeValidator(_method), PlainSerializer(_plain)]
"""A method in another's settings: its name, or a mapping with its name and settings."""


class Mix(Mixture):
    """Methods side by side in one adapter."""

    name: ClassVar[str] = "mix"
    summary: ClassVar[str] = "any list of methods as one adapter"
    peft_type: ClassVar[str] = "VENEER_MIX"
    of_members: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {"methods": ["bitfit", "norm"]}

    methods: tuple[Member, ...] = Field(min_length=1)
    """Which: names, or names with settings, e.g. [{name: lora, rank: 8}, bitfit]."""

    @field_validator("methods")
    @classmethod
    def _by_themselves(cls, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        if odd := next((method.name for method in methods if method.origins), None):
            raise ValueError(f"{odd} starts from trained adapters and can't be a part of a mix")
        return methods

    def members(self) -> Sequence[Method]:
        """Those given."""
        return self.methods

    def for_tasks(self, names: Sequence[str] | None) -> Method:
        """With methods that know these tasks."""
        return Mix(methods=[method.for_tasks(names) for method in self.methods])

    def on(self, base: BaseWeights) -> Method:
        """With what only this base can tell of each."""
        return Mix(methods=[method.on(base) for method in self.methods])
