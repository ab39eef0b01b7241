"""Head only: the base stays as it is, and nothing but the task's own head is trained.

The baseline every adapter on a classification task has to beat (linear probing). No parameters at any site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Delta
from veneer.errors import ConfigError
from veneer.methods.base import Lowering, Method


class HeadOnly(Method):
    """No change inside the base; the task's head alone is trained."""

    name: ClassVar[str] = "head"
    summary: ClassVar[str] = "trains the task's head only: the baseline for classification"
    learning_rate: ClassVar[float] = 2e-2
    baseline: ClassVar[Literal["whole", "head"] | None] = "head"
    peft_type: ClassVar[str] = "VENEER_HEAD"

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """None."""
        return ()

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """Never asked for: there are no sites."""
        raise ConfigError("The head-only method acts at no site.")
