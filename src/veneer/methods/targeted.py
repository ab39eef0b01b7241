"""Methods that act on maps a user picks: `targets`, `exclude` and `layers`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from veneer.bases import Site, SiteMap
from veneer.bases.sites import ALL_LINEAR
from veneer.errors import TargetError
from veneer.methods.base import Method


class Targeted(Method):
    """A method with targets."""

    kinds: ClassVar[Collection[str]] = ("linear",)
    """The kinds of sites it can act at."""
    words: ClassVar[Mapping[str, str]] = {}
    """Further words for targets, and the expressions they stand for."""

    targets: str | tuple[str, ...] = ALL_LINEAR
    """Where: all-linear, attention, mlp, experts, roles (q, k, v, o, up, gate, down), module names, or
    /regular expressions/."""
    exclude: str | tuple[str, ...] = ()
    """Where not, in the same words."""
    layers: str | None = None
    """Which layers, as a slice: "8:" all from the ninth on, "-4:" the last four, "0:6" the first six."""

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The sites picked.

        Raises:
            TargetError: a word picks nothing, or all together leave nothing, or what they pick is of a kind the
                method doesn't act on.
        """
        found = sites.resolve(
            self.targets, exclude=self.exclude, layers=self.layers, kinds=self.kinds, words=self.words
        )
        if other := [site for site in found if site.kind not in self.kinds]:
            raise TargetError(
                f"{self.name} acts on sites of kind {', '.join(self.kinds)} only, and {other[0].path} is of kind "
                f"{other[0].kind}; leave it out of `targets`."
            )
        return found

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With targets in module names, which say it all: peft knows neither roles nor groups nor slices."""
        fields = super().to_peft(sites, site_map) | {"target_modules": site_map.shortest_names(sites)}
        return {key: value for key, value in fields.items() if key not in ("exclude", "layers")}
