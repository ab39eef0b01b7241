"""What a method is: a configuration, the parameters it needs at each site, and their lowering to deltas."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from veneer.bases import Site, SiteMap
from veneer.bases.weights import bare, parameters_at, weight_of
from veneer.deltas import AtParameter, Delta, Flow
from veneer.errors import AdapterError, ConfigError, did_you_mean
from veneer.mistakes import mistakes


@dataclass(frozen=True)
class BaseWeights:
    """The base as a method may read it.

    Attributes:
        model: the base.
        tokenizer: its tokenizer, or None where there is none.
        task: what the adapter is for, as a plain mapping (template, labels …); empty where that is not known yet.
        loading: the values asked for are overwritten by those of a file next: their shapes are all that matters.
        unquantized: loads the base as it was before it was quantised, if it was and that can be had.
    """

    model: nn.Module
    tokenizer: Any = None
    task: Mapping[str, Any] = field(default_factory=dict)
    loading: bool = False
    unquantized: Callable[[], nn.Module] | None = None

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """The base's own parameters at a site, weights as ``[…, out, in]``; of quantised ones what they stand for."""
        return parameters_at(self.model, site)

    def original(self, site: Site) -> dict[str, Tensor]:
        """`parameters` as they were before the base was quantised.

        Raises:
            AdapterError: it is not quantised, or they can't be had.
        """
        if self._unquantized is None:
            raise AdapterError(
                "This start needs the weights from before the base was quantised, and there are none: load it by name "
                'with quantize="nf4" or "int8".'
            )
        return parameters_at(self._unquantized, site)

    @cached_property
    def _unquantized(self) -> nn.Module | None:
        return self.unquantized() if self.unquantized else None


@dataclass(frozen=True)
class Lowering(BaseWeights):
    """What `Method.lower` may want to know about the step it lowers for.

    Attributes:
        training: whether the adapter is in training mode.
        flow: the forward it is lowered for.
        condition: what rows are told beside their input (the name of a task, or a vector), where the method asks it.
    """

    training: bool = field(kw_only=True)
    flow: Flow = field(kw_only=True)
    condition: Any = None


class Survey(Protocol):
    """The data a method may look at before the first step, through the adapter as it starts out."""

    def gradients(self, sites: Sequence[Site], examples: int) -> Iterator[Mapping[str, Tensor]]:
        """∂ −log p(y | x) / ∂ W of single examples, one after the other, W the base's weight at each site.

        Args:
            sites: where.
            examples: how many; all there are, if there are fewer.

        Yields:
            Path of a site -> ``[…, out, in]``.
        """

    def inputs(self, sites: Sequence[Site], examples: int) -> Iterator[Mapping[str, Tensor]]:
        """What the maps at these sites are given, batch by batch, padding left out.

        Yields:
            Path of a site -> ``[tokens, in]``, float32.
        """


class Course:
    """What a method does in the course of training besides taking gradients; each part does nothing by default.

    Steps count optimiser steps from 1.
    """

    def penalty(self) -> Tensor | None:
        """What to add to the mean loss of a step."""
        return None

    def before_step(self, step: int) -> None:
        """Called when the gradients of a step are complete."""

    def after_step(self, step: int) -> None:
        """Called when the optimiser has moved the parameters."""

    def final_from(self) -> int:
        """The first step whose weights may be kept as the run's best: those before are not yet what was asked for."""
        return 0

    def state(self) -> dict[str, Tensor]:
        """The tensors a resumed run needs, by name; they are written in place when it is resumed."""
        return {}


def widened(value: Tensor) -> Tensor:
    """In float32, or wider if it is: what is trained is kept in."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def around_module(site: Any, delta: Delta) -> Delta:
    """A site's delta as it acts on the module the site belongs to, which may keep the map as a bare parameter."""
    if (name := getattr(site, "parameter", None)) is None:
        return delta
    return AtParameter(name, delta, functools.partial(weight_of, site), functools.partial(bare, site))


State = tuple["Method", Mapping[str, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A method, its parameters by site, and its shared ones."""


class Method(BaseModel):
    """A PEFT technique. Its fields are its hyper-parameters; unknown ones are an error.

    A subclass in `veneer.methods` is found by its `name` without being listed anywhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: ClassVar[str]
    """What configs call it."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names configs may call it."""
    summary: ClassVar[str]
    """One line for `veneer methods`: what it is, when to use it."""
    paper: ClassVar[str] = ""
    """Where it is from: "Hu et al. 2021, arXiv:2106.09685"; empty for what is nobody's."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Settings to try it with, if it can't do without any."""
    learning_rate: ClassVar[float]
    """A default that learns."""
    baseline: ClassVar[Literal["whole", "head"] | None] = None
    """What it is a baseline for in comparisons: training the whole base, or nothing of it but the task's head."""
    of_members: ClassVar[bool] = False
    """Whether how it acts, merges and mixes by row is told by the methods in its settings alone."""
    row_mixable: ClassVar[bool] = True
    """Whether rows under it may share a batch with rows that are not."""
    outcomes: ClassVar[frozenset[str]] = frozenset()
    """Settings that say what a training came to: its files have them, and nobody gives them."""
    peft_type: ClassVar[str]
    """Its ``peft_type`` in ``adapter_config.json``: peft's own wherever peft has the method."""
    peft_prefix: ClassVar[str] = "base_model.model."
    """What peft puts before a module's path in files of this type."""
    peft_names: ClassVar[Mapping[str, str]] = {}
    """peft's spelling of a field -> ours."""
    peft_checked: ClassVar[frozenset[str]] = frozenset()
    """Further options of peft's that `from_peft` reads or refuses itself."""

    def __init__(self, *unnamed: Any, **settings: Any) -> None:
        if unnamed:
            names = ", ".join(f"{name}=…" for name in type(self).model_fields)
            raise ConfigError(f"{type(self).__name__} takes its settings by name ({names}), not {unnamed[0]!r}.")
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError("; ".join(self._problems(error))) from error

    def check_new(self) -> None:
        """Raises ConfigError if it is not what a new adapter can be, but only what one that is trained comes to."""
        for name in sorted(self.outcomes):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(f"method.{name}: only the training of {self.name} sets it, at its end; leave it out.")

    @property
    def conditioned(self) -> bool:
        """Whether it acts by what each row is told of its task."""
        return False

    @property
    def asks(self) -> str | None:
        """Why it can't act on any text at all, as a clause whose subject it is; None if it can."""
        return None

    def for_tasks(self, names: Sequence[str] | None) -> Method:
        """Itself, for data whose rows are of these tasks; None if they say nothing of tasks.

        Raises:
            ConfigError: it can't do without, or knows other tasks.
        """
        return self

    @property
    def origins(self) -> Sequence[str]:
        """Trained adapters it starts from: folders, or names of attached ones."""
        return ()

    def over(self, trained: Sequence[Method]) -> Method:
        """Itself, knowing what its origins are."""
        return self

    def started(
        self,
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
        trained: Sequence[State],
    ) -> tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Tensor]]:
        """Its initial values, by site and shared, with what comes from its origins."""
        return parameters, shared

    @abstractmethod
    def sites(self, sites: SiteMap) -> Sequence[Any]:
        """Where it acts in this base: `Site`s or `AttentionSite`s."""

    def remarks(self, sites: Sequence[Any]) -> Sequence[str]:
        """What it does otherwise at these sites than its settings say, in sentences for people."""
        return ()

    def shared(self, sites: Sequence[Any], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Initial values of parameters that all sites share, float32, by name."""
        return {}

    def parameters(self, site: Any, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Initial values of its parameters at a site, by name: float32, trained unless `fixed`; or integers."""
        return {}

    def initial(
        self, sites: Sequence[Any], generator: torch.Generator, base: BaseWeights
    ) -> dict[str, dict[str, Tensor]]:
        """`parameters` at all its sites, by path; for overriding where those of one site depend on the other sites."""
        return {site.path: self.parameters(site, generator, base) for site in sites}

    def fixed(self) -> Container[str]:
        """Names of parameters that are not trained, but kept in the adapter's files."""
        return ()

    def derived(self) -> Container[str]:
        """Names of parameters that are neither trained nor kept, because the settings alone say what they are."""
        return ()

    def sized(self) -> Collection[str]:
        """Names of parameters whose sizes data or training decide: whoever reads its files takes them from there."""
        return ()

    def fault(self, site: Any, parameters: Mapping[str, Tensor]) -> str | None:
        """What is wrong with parameters from a file whose sizes it told, or that point somewhere; None if nothing."""
        return None

    def meets(self) -> Collection[int]:
        """Ids of the tokens that its parameters belong to: rows without them teach these nothing."""
        return ()

    def on(self, base: BaseWeights) -> Method:
        """The method with what only this base can tell (which id a token has)."""
        return self

    @abstractmethod
    def lower(self, site: Any, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The delta the parameters, shared and the site's own, amount to; differentiable, evaluated once a step."""

    @classmethod
    def _problems(cls, error: ValidationError) -> list[str]:
        found = []
        for mistake in mistakes(error, lambda loc: 2 if len(loc) > 1 and isinstance(loc[1], int) else 1):
            if mistake.kind != "extra_forbidden":
                found.append(mistake.line("method"))
                continue
            key = str(mistake.path[0])
            known = ", ".join(cls.model_fields)
            hint = f" It is called method.{cls.peft_names[key]} here." if key in cls.peft_names else ""
            hint = hint or did_you_mean(key, cls.model_fields) or (f" Known: {known}." if known else " It has none.")
            found.append(f"method.{key}: unknown setting of {cls.name}.{hint}")
        return found

    def rate(self, name: str) -> float:
        """How many times the learning rate the parameter of this name takes."""
        return 1.0

    def surveys(self) -> bool:
        """Whether it wants to look at the data before the first step of a training."""
        return False

    @property
    def lookers(self) -> Sequence[str]:
        """Names of the methods in it that want to look at the data: itself, or nobody."""
        return [self.name] if self.surveys() else []

    def surveyed(
        self,
        sites: Sequence[Any],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
        survey: Survey,
    ) -> State:
        """What it starts from once it has seen the data: the method, its parameters by site and its shared ones.

        Called once, before the first step, of methods that say so by `surveys`. Deterministic: a run that is
        reproduced sees the same data again.
        """
        return self, dict(parameters), dict(shared)

    def course(self, parameters: Mapping[str, Mapping[str, Tensor]], steps: int) -> Course | None:
        """What it does in the course of a training of so many steps, given its parameters by site; None for nothing."""
        return None

    def settled(
        self,
        sites: Sequence[Any],
        parameters: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> State | None:
        """What it comes to once it is trained: a method without what only training needs, its parameters by site and
        its shared ones, which act at the same sites as these do out of training; None for as it is.
        """
        return None

    @classmethod
    def of_deltas(
        cls, deltas: Mapping[Site, tuple[Delta, Mapping[str, Tensor]]], rank: int | None
    ) -> tuple[Self, Mapping[str, Mapping[str, Tensor]], Mapping[str, float]]:
        """The method, its parameters by site, and the error at each, that do what these deltas do.

        Args:
            deltas: at sites whose own parameters stand beside them.
            rank: to approximate to; None for what is exact only.

        Raises:
            AdapterError: they can't be written as this method.
        """
        raise AdapterError(f"Adapters can't be written as {cls.name}; lora is what most can be written as.")

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """Its fields for ``adapter_config.json``, in peft's spelling, when it acts at ``sites`` of ``site_map``."""
        ours = {name: theirs for theirs, name in self.peft_names.items()}
        return {ours.get(key, key): value for key, value in self.model_dump(mode="json").items()}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether an ``adapter_config.json`` is for this method."""
        return config.get("peft_type") == cls.peft_type

    @classmethod
    def read(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The tensors of a file peft wrote that this method has use for: all, unless peft keeps more than it uses."""
        return state

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The method an ``adapter_config.json`` describes.

        Raises:
            AdapterFileError: it asks for something this method does not do.
        """
        return cls(**{ours: config[theirs] for theirs, ours in cls.peft_names.items() if theirs in config})
