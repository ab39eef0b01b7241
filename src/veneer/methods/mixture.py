"""Several methods as one adapter: what `mix` and its presets share.

At each module the deltas of the methods that act there stand one after the other, in the methods' order. Each method
keeps its own parameters, under its place in that order, its own phases, and its own learning rate: all of them are
multiplied alike where a run asks for another one than the default.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.bases import SiteMap
from veneer.deltas import Delta, Stack
from veneer.errors import TargetError
from veneer.methods.base import BaseWeights, Course, Lowering, Method, State, Survey, around_module

_Values = Mapping[str, Mapping[str, Tensor]]


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

    def check_new(self) -> None:
        """Nor any of them."""
        super().check_new()
        for method in self.members():
            method.check_new()

    @property
    def conditioned(self) -> bool:
        """Whether one of them does."""
        return any(method.conditioned for method in self.members())

    @property
    def asks(self) -> str | None:
        """The reason of the first that has one."""
        found = (f"holds {method.name}, which {method.asks}" for method in self.members() if method.asks)
        return next(found, None)

    def for_tasks(self, names: Sequence[str] | None) -> Method:
        """Itself, whose methods know all of these tasks if they act by any.

        Raises:
            ConfigError: one doesn't.
        """
        for method in self.members():
            method.for_tasks(names)
        return self

    def sites(self, sites: SiteMap) -> Sequence[Junction]:
        """Where any of them acts."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for index, method in enumerate(self.members()):
            for site in method.sites(sites):
                if not site.path:
                    raise TargetError(f"{method.name} trains the whole base; nothing can stand beside it in a mixture.")
                found.setdefault(site.path, []).append((index, site))
        return [Junction(path, tuple(members)) for path, members in found.items()]

    def remarks(self, sites: Sequence[Junction]) -> Sequence[str]:
        """Those of each method."""
        return [said for index, method in enumerate(self.members()) for said in method.remarks(_of(index, sites))]

    def shared(self, sites: Sequence[Junction], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """What each method's sites share."""
        return {
            key_of(index, name): value
            for index, method in enumerate(self.members())
            for name, value in method.shared(_of(index, sites), generator, base).items()
        }

    def initial(
        self, sites: Sequence[Junction], generator: torch.Generator, base: BaseWeights
    ) -> dict[str, dict[str, Tensor]]:
        """Those of each method, and the mixture's own."""
        values = {junction.path: self.own(junction, generator) for junction in sites}
        for index, method in enumerate(self.members()):
            for path, its in method.initial(_of(index, sites), generator, base).items():
                values[path] |= {key_of(index, name): value for name, value in its.items()}
        return values

    def own(self, site: Junction, generator: torch.Generator) -> dict[str, Tensor]:
        """Initial values of parameters of the mixture itself, beside the methods'."""
        return {}

    def fixed(self) -> Container[str]:
        """Those of each method."""
        return _Names([method.fixed() for method in self.members()])

    def derived(self) -> Container[str]:
        """Those of each method."""
        return _Names([method.derived() for method in self.members()])

    def sized(self) -> Collection[str]:
        """Those of each method."""
        return {key_of(index, name) for index, method in enumerate(self.members()) for name in method.sized()}

    def meets(self) -> Collection[int]:
        """Those of each method."""
        return {token for method in self.members() for token in method.meets()}

    def fault(self, site: Junction, parameters: Mapping[str, Tensor]) -> str | None:
        """That of the first method with one."""
        faults = (self.members()[index].fault(own, parameters_of(index, parameters)) for index, own in site.members)
        return next((fault for fault in faults if fault), None)

    def lower(self, site: Junction, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """One after the other."""
        members = self.members()
        deltas = [
            around_module(own, members[index].lower(own, parameters_of(index, parameters), step))
            for index, own in site.members
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
            its = {path: parameters_of(index, values) for path, values in parameters.items()}
            course = method.course({path: values for path, values in its.items() if values}, steps)
            if course is not None:
                courses[index] = course
        return _Courses(courses) if courses else None

    def surveys(self) -> bool:
        """Whether one of them wants to look at the data."""
        return any(method.surveys() for method in self.members())

    @property
    def lookers(self) -> Sequence[str]:
        """Those of its methods."""
        return [name for method in self.members() for name in method.lookers]

    def surveyed(
        self,
        sites: Sequence[Junction],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
        survey: Survey,
    ) -> State:
        """A mix of what each method starts from."""

        def look(method: Method, own: Sequence[Any], values: _Values, common: Mapping[str, Tensor]) -> State | None:
            return method.surveyed(own, values, common, survey) if method.surveys() else None

        return self._each(sites, parameters, shared, look) or (self, parameters, shared)

    def settled(
        self,
        sites: Sequence[Junction],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> State | None:
        """A mix of what each method comes to."""
        return self._each(sites, parameters, shared, lambda method, *state: method.settled(*state))

    def _each(
        self,
        sites: Sequence[Junction],
        parameters: _Values,
        shared: Mapping[str, Tensor],
        become: Callable[[Method, Sequence[Any], _Values, Mapping[str, Tensor]], State | None],
    ) -> State | None:
        """A mix of what each method becomes; None if all stay as they are."""
        from veneer.methods.mix import Mix

        members, changed = list(self.members()), False
        new_values: dict[str, dict[str, Tensor]] = {path: {} for path in parameters}
        new_shared: dict[str, Tensor] = {}
        for index, method in enumerate(members):
            own = {site.path: parameters_of(index, parameters[site.path]) for site in _of(index, sites)}
            found = become(method, _of(index, sites), own, parameters_of(index, shared))
            changed |= found is not None
            members[index], values, common = found or (method, own, parameters_of(index, shared))
            new_shared |= {key_of(index, name): value for name, value in common.items()}
            for path, its in values.items():
                new_values[path] |= {key_of(index, name): value for name, value in its.items()}
        return (Mix(methods=members), new_values, new_shared) if changed else None

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """As it is: peft keeps no mixtures."""
        return self.model_dump(mode="json")


class _Names(Container[str]):
    """Names of several methods by their place."""

    def __init__(self, names: Sequence[Container[str]]) -> None:
        self.names = names

    def __contains__(self, name: object) -> bool:
        index, _, own = str(name).partition(".")
        return index.isdigit() and own in self.names[int(index)]


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

    def final_from(self) -> int:
        return max(course.final_from() for course in self.courses.values())

    def state(self) -> dict[str, Tensor]:
        return {key_of(i, name): value for i, course in self.courses.items() for name, value in course.state().items()}


def key_of(index: int, name: str) -> str:
    """The mixture's name for a method's parameter."""
    return f"{index}.{name}"


def parameters_of(index: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A method's parameters, by its own names."""
    prefix = key_of(index, "")
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _of(index: int, sites: Sequence[Junction]) -> list[Any]:
    """A method's sites."""
    return [site for junction in sites for member, site in junction.members if member == index]
