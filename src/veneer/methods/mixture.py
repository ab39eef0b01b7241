"""Several methods as one adapter: what `mix` and its presets share.

At each module the deltas of the methods that act there stand one after the other, in the methods' order. Each method
keeps its own parameters, under its place in that order, its own phases, and its own learning rate: all of them are
multiplied alike where a run asks for another one than the default.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.bases import SiteMap
from veneer.deltas import Delta, Stack
from veneer.methods.base import BaseWeights, Course, Lowering, Method, around_module


@dataclass(frozen=True)
class Junction:
    """A place at which one or more of the methods act.

    Attributes:
        path: of the place.
        members: which of the methods, and its site there.
    """

    path: str
    members: tuple[tuple[int, Any], ...]

    @property
    def module(self) -> str:
        """Path of the module it belongs to."""
        return getattr(self.members[0][1], "module", self.path)

    @property
    def source(self) -> str | None:
        """Path of the module whose input is read here."""
        found = (getattr(site, "source", None) for _, site in self.members)
        return next((source for source in found if source is not None), None)


class Mixture(Method):
    """Methods side by side in one adapter."""

    learning_rate: ClassVar[float] = 1e-3

    @abstractmethod
    def members(self) -> Sequence[Method]:
        """The methods."""

    def sites(self, sites: SiteMap) -> Sequence[Junction]:
        """Where any of them acts."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for index, method in enumerate(self.members()):
            for site in method.sites(sites):
                found.setdefault(site.path, []).append((index, site))
        return [Junction(path, tuple(members)) for path, members in found.items()]

    def shared(self, sites: Sequence[Junction], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """What each method's sites share."""
        return {
            _key(index, name): value
            for index, method in enumerate(self.members())
            for name, value in method.shared(_of(index, sites), generator, base).items()
        }

    def parameters(self, site: Junction, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Those of each method that acts here."""
        return {
            _key(index, name): value
            for index, own in site.members
            for name, value in self.members()[index].parameters(own, generator, base).items()
        }

    def fixed(self) -> Collection[str]:
        """Those of each method."""
        return {_key(index, name) for index, method in enumerate(self.members()) for name in method.fixed()}

    def derived(self) -> Collection[str]:
        """Those of each method."""
        return {_key(index, name) for index, method in enumerate(self.members()) for name in method.derived()}

    def lower(self, site: Junction, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """One after the other."""
        members = self.members()
        deltas = [
            around_module(own, members[index].lower(own, _its(index, parameters), step)) for index, own in site.members
        ]
        return Stack(deltas) if len(deltas) > 1 else deltas[0]

    def rate(self, name: str) -> float:
        """The method's own, beside its default."""
        index, _, own = name.partition(".")
        method = self.members()[int(index)]
        return method.rate(own) * method.learning_rate / self.learning_rate

    def course(self, parameters: Mapping[str, Mapping[str, Tensor]], steps: int) -> Course | None:
        """Those of all methods."""
        courses = {}
        for index, method in enumerate(self.members()):
            its = {path: _its(index, values) for path, values in parameters.items()}
            course = method.course({path: values for path, values in its.items() if values}, steps)
            if course is not None:
                courses[index] = course
        return _Courses(courses) if courses else None

    def settled(
        self,
        sites: Sequence[Junction],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]] | None:
        """A mix of what each method comes to."""
        from veneer.methods.mix import Mix

        members = list(self.members())
        new_values: dict[str, dict[str, Tensor]] = {path: {} for path in parameters}
        new_shared: dict[str, Tensor] = {}
        for index, method in enumerate(members):
            own = {path: its for path, values in parameters.items() if (its := _its(index, values))}
            all_its = {site.path: own.get(site.path, {}) for site in _of(index, sites)}
            settled = method.settled(_of(index, sites), all_its, _its(index, shared))
            members[index], values, common = settled or (method, own, _its(index, shared))
            new_shared |= {_key(index, name): value for name, value in common.items()}
            for path, its in values.items():
                new_values[path] |= {_key(index, name): value for name, value in its.items()}
        return None if members == list(self.members()) else (Mix(methods=members), new_values, new_shared)

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """As it is: peft keeps no mixtures."""
        return self.model_dump(mode="json")


class _Courses(Course):
    """Several, of methods by their place."""

    def __init__(self, courses: Mapping[int, Course]) -> None:
        self.courses = courses

    def penalty(self) -> Tensor | None:
        found = [penalty for course in self.courses.values() if (penalty := course.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def before_step(self, step: int) -> None:
        for course in self.courses.values():
            course.before_step(step)

    def after_step(self, step: int) -> None:
        for course in self.courses.values():
            course.after_step(step)

    def state(self) -> dict[str, Tensor]:
        return {_key(i, name): value for i, course in self.courses.items() for name, value in course.state().items()}


def _key(index: int, name: str) -> str:
    """The mixture's name for a method's parameter."""
    return f"{index}.{name}"


def _its(index: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A method's parameters, by its own names."""
    prefix = _key(index, "")
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _of(index: int, sites: Sequence[Junction]) -> list[Any]:
    """A method's sites."""
    return [site for junction in sites for member, site in junction.members if member == index]
