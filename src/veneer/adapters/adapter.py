"""An adapter: a named instance of a method over a base, a module that owns its parameters and nothing else."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from veneer.adapters.plan import Plan
from veneer.adapters.trainers import Backbone, Trainable
from veneer.bases import Site
from veneer.deltas import Delta, Flow, Replace, Stack, Tokens
from veneer.errors import AdapterError, VeneerWarning
from veneer.methods import Lowering, Method, Survey
from veneer.methods.base import State, around_module

if TYPE_CHECKING:
    from veneer.adapters.base import Base

PREFIX = "base_model.model."
"""What peft puts before a module's path; here the path of the adapter's own parameter tree."""


class Adapter(Trainable):
    """A method's parameters over a base.

    Calling it runs the base with this adapter and no other. Its ``state_dict()`` holds the adapter alone, under
    the names peft uses in files; `Trainer`, DDP, optimisers and ``.to()`` treat it as any module. The base is
    reached through it but is no part of it.

    Attributes:
        base: the base it acts on.
        name: its name there.
        method: the method and its hyper-parameters.
        sites: where it acts.
        task: what it was made for, as a plain mapping that goes into its files (template, labels …).
        record: what is known of its training (data, metrics, settings), likewise.
        unsurveyed: whether its method wants to look at data before it is trained, and has not yet.
    """

    def __init__(
        self,
        base: Base,
        name: str,
        method: Method,
        sites: Sequence[Site],
        values: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
        task: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.method = method
        self.sites = tuple(sites)
        self.task = dict(task)
        self.record: dict[str, Any] = {}
        self._condition: Any = None
        self.unsurveyed = method.surveys()
        self._shared: dict[str, str] = {}
        self._at_sites: dict[str, dict[str, str]] = {}
        self._in_full: dict[str, dict[str, str]] = {}
        self.replace(method, values, shared)

    @classmethod
    def over(cls, model: nn.Module) -> type[Self]:
        """The adapter class for this class of model: the same, with the model's own ``forward`` signature."""
        return _with_signature_of(cls, type(model))  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base with this adapter; arguments and result are those of the base."""
        if self.unsurveyed and self.training and torch.is_grad_enabled():
            self._warn_unsurveyed()
        with self.acting():
            return self.base.model(*args, **kwargs)

    @contextlib.contextmanager
    def conditioned(self, condition: Any) -> Iterator[None]:
        """Tell calls of this adapter inside the block what its method asks of each row.

        Args:
            condition: the name of a task or a vector, for all rows; or a list of these (or a matrix), one a row.

        Raises:
            AdapterError: the method asks nothing.
        """
        if not self.method.conditioned:
            raise AdapterError(f"{self.method.name} takes no condition: it does the same in every row.")
        before, self._condition = self._condition, condition
        try:
            yield
        finally:
            self._condition = before

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's ``generate`` with this adapter."""
        with self.acting():
            return self.base.model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Have the base run with this adapter inside the block."""
        with self.base.using(self.name, condition=self._condition):
            yield

    def lower(
        self, flow: Flow | None = None, *, training: bool | None = None, condition: Any = None
    ) -> dict[str, Delta]:
        """The deltas this adapter amounts to, by where they act, for a forward; in its own mode unless told which."""
        step = Lowering(
            self.base.model,
            training=self.training if training is None else training,
            flow=flow or Flow(),
            condition=condition,
        )
        plan: dict[str, Delta] = {}
        for site in self.sites:
            delta = around_module(site, self.method.lower(site, self.parameters_at(site.path), step))
            where = getattr(site, "module", site.path)
            plan[where] = Stack((plan[where], delta)) if where in plan else delta
        plan.update({path: Replace(values) for path, values in self.modules_in_full.items()})
        return plan

    @property
    def places(self) -> list[str]:
        """Paths of the modules it acts at, or reads the input of."""
        acting = [getattr(site, "module", site.path) for site in self.sites]
        read = [source for site in self.sites if (source := getattr(site, "source", None)) is not None]
        return [*dict.fromkeys([*acting, *read]), *self._in_full]

    def parameters_at(self, path: str) -> Mapping[str, Tensor]:
        """Its parameters at one site and those shared by all, by the method's names for them."""
        return self._values({**self._shared, **self._at_sites[path]})

    def replace(self, method: Method, values: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor]) -> None:
        """Be this method with these parameters, by site and shared, from now on; at the same sites as before."""
        for key in [*self._shared.values(), *(key for keys in self._at_sites.values() for key in keys.values())]:
            self._drop(key)
        self.method = method
        self._shared = self._own("", shared)
        names = _names_in_files(self.sites)
        self._at_sites = {path: self._own(names[path], tensors) for path, tensors in values.items()}
        for key in (key for keys in self._in_full.values() for key in keys.values()):
            self._parameters[key] = self._parameters.pop(key)  # last again: optimisers know parameters by their order

    def _drop(self, key: str | None) -> None:
        self._parameters.pop(key, None)  # type: ignore[arg-type]
        self._buffers.pop(key, None)  # type: ignore[arg-type]
        self._non_persistent_buffers_set.discard(key)

    @property
    def state(self) -> State:
        """Its method, and its parameters by site and shared, as `replace` takes them."""
        values = {path: self._detached(keys) for path, keys in self._at_sites.items()}
        return self.method, values, self._detached(self._shared)

    def survey(self, survey: Survey) -> None:
        """Let its method look at data, if it wants to and has not yet, and start from what it finds there."""
        if self.unsurveyed:
            method, values, shared = self.state
            self.replace(*method.surveyed(self.sites, values, shared, survey))
            self.unsurveyed = False

    def settle(self) -> None:
        """Drop what only training needed. What the adapter does out of training stays the same; training it further
        goes on from there."""
        method, values, shared = self.state
        settled = method.settled(self.sites, values, shared)
        if settled is not None:
            self.replace(*settled)

    def shape_like(self, method: Method, state: Mapping[str, Tensor]) -> None:
        """Be a method whose parameters are as large as those of a file, to be filled from it."""
        _, values, shared = self.state
        self.replace(
            method,
            {path: self._as_large(values[path], keys, state) for path, keys in self._at_sites.items()},
            self._as_large(shared, self._shared, state),
        )
        self.unsurveyed = False

    def keys_of(self, names: Collection[str]) -> set[str]:
        """The keys, in this module, of the method's parameters of these names."""
        return {key for keys in (self._shared, *self._at_sites.values()) for name, key in keys.items() if name in names}

    @staticmethod
    def _as_large(
        values: Mapping[str, Tensor], keys: Mapping[str, str], state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(state[keys[name]], device=value.device) if keys[name] in state else value
            for name, value in values.items()
        }

    def _warn_unsurveyed(self) -> None:
        self.unsurveyed = False
        warnings.warn(
            f"{self.method.name} looks at the data before the first step, and has seen none: it starts from random "
            "choices instead. veneer.train and `veneer train` show it the data.",
            VeneerWarning,
            stacklevel=4,
        )

    def _detached(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self._values(keys).items()}

    def own_modules(self, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over modules of the base: they run on parameters of this adapter, with these initial values."""
        for path, tensors in modules.items():
            for name in tensors:  # an adapter of the whole model has them already
                self._drop(self._at_sites.get("", {}).pop(f"{path}.{name}", None))
        self._in_full.update({path: self._own(path, tensors, ()) for path, tensors in modules.items()})

    @property
    def modules_in_full(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The modules (a task's head) that run on parameters of the adapter's own, by path."""
        return {path: self._values(keys) for path, keys in self._in_full.items()}

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.base.model.config

    @property
    def device(self) -> torch.device:
        """Where the base and the adapter are."""
        return self.base.device

    @property
    def rates(self) -> Mapping[str, float]:
        """How many times the learning rate its method's parameters take, by key in this module."""
        named = [*self._shared.items(), *(item for keys in self._at_sites.values() for item in keys.items())]
        return {key: self.method.rate(name) for name, key in named if key in self._parameters}

    @property
    def trainable(self) -> int:
        """How many numbers it trains."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def trainable_share(self) -> float:
        """The same as a share of the base's parameters."""
        return self.share(self.trainable)

    def share(self, count: int) -> float:
        """So many numbers as a share of the base's parameters, a head of the adapter's own counted in their place."""
        replaced = self.base.parameter_count
        for path, values in self.modules_in_full.items():
            module = self.base.model.get_submodule(path)
            replaced += sum(value.numel() - module.get_parameter(name).numel() for name, value in values.items())
        return count / replaced

    @property
    def nbytes(self) -> int:
        """Bytes of what its files hold: what it trains, and what else it can't do without (places of entries …)."""
        return sum(value.nbytes for value in self.state_dict().values())

    def merged(self) -> nn.Module:
        """A copy of the base model with this adapter folded into its weights. The base stays as it is.

        If the base is quantised, the copy isn't: its weights are what the quantised ones stand for.

        Raises:
            AdapterError: it cannot be merged.
        """
        from veneer.adapters.merging import merged

        return merged(self)

    def save(self, folder: Any) -> None:
        """Write the adapter folder: peft's two files and ``veneer.json``, all or nothing."""
        from veneer.adapters.files import save

        save(self, folder)

    def train(self, mode: bool = True) -> Self:
        """Set training mode of the adapter and of the base (whose dropout acts in training)."""
        if self.base.adapters.get(self.name) is self:
            self.base.model.train(mode)
        return super().train(mode)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As for any module; a change of device takes the base along, a change of dtype doesn't."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None:
            self.base.model.to(device)
        return super().to(*args, **kwargs)

    def __repr__(self) -> str:
        share = f"{self.trainable:,} trainable, {self.trainable_share:.2%} of {self.base.name}"
        return f"<Adapter {self.name!r}: {self.method!r}, {share}>"

    @functools.cached_property
    def base_model(self) -> Backbone:
        """The base without its head, run with this adapter; trainers ask for it by this name."""
        return Backbone(self._run_backbone)

    def _run_backbone(self, *args: Any, **kwargs: Any) -> Any:
        if self._adds_tokens:
            raise AdapterError(
                "This adapter puts virtual tokens into the input, around the whole model; a trainer that calls the "
                "backbone by itself (TRL's do) would train nothing. Use veneer.train or transformers' Trainer."
            )
        with self.acting():
            return self.base.backbone(*args, **kwargs)

    @property
    def positions(self) -> int:
        """How many positions of a row it takes for itself: those of a prefix and of virtual tokens."""
        plan = Plan.of(self.lower(training=False))
        prefixes = max((len(prefix) for prefix in plan.attention.values()), default=0)
        return prefixes + (plan.tokens.growth if isinstance(plan.tokens, Tokens) else 0)

    @functools.cached_property
    def _adds_tokens(self) -> bool:
        return Plan.of(self.lower(training=False)).tokens is not None

    def _values(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors of these keys; looked up anew, because ``.to()`` replaces buffers."""
        return {
            name: self._parameters[key] if key in self._parameters else self._buffers[key]  # type: ignore[misc]
            for name, key in keys.items()
        }

    def _own(self, path: str, tensors: Mapping[str, Tensor], fixed: Container[str] | None = None) -> dict[str, str]:
        """Register tensors under the names peft gives them: as parameters, or as buffers if they aren't trained.

        All in this one module, dots and all: a tree of modules as deep as the base's would be thousands of objects
        an adapter, and attaching the hundredth would wait for the garbage collector.

        Args:
            path: of the site.
            tensors: by name.
            fixed: names of those that aren't trained; by default what the method says.

        Returns:
            The keys, by the names given.
        """
        fixed = self.method.fixed() if fixed is None else fixed
        keys: dict[str, str] = {}
        device = self.base.device
        for name, tensor in tensors.items():
            key = f"{PREFIX}{path}.{name}" if path else name
            keys[name] = key
            tensor = tensor.to(device).contiguous()  # as from a file: a resumed run computes the same bits
            derived = name in self.method.derived()
            if tensor.is_floating_point() and not derived and name not in fixed:
                self._parameters[key] = nn.Parameter(tensor)
                continue
            self._buffers[key] = tensor
            if derived:
                self._non_persistent_buffers_set.add(key)
        return keys

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """torch takes a key with a dot for one of a child."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected = args[3]
        own = {prefix + key for key in (*self._parameters, *self._buffers)}
        unexpected[:] = [key for key in unexpected if key not in own]


def _names_in_files(sites: Sequence[Any]) -> dict[str, str]:
    """The path peft writes each site's tensors under: its own, except where peft wraps a module once a parameter."""
    names = {site.path: site.path for site in sites}
    experts: dict[str, list[str]] = {}
    for site in sites:
        if getattr(site, "count", 0):
            experts.setdefault(site.module, []).append(site.path)
    for module, paths in experts.items():
        names |= {path: module + ".base_layer" * inside for inside, path in enumerate(reversed(paths))}
    return names


@functools.cache
def _with_signature_of(cls: type[Adapter], model: type[nn.Module]) -> type[Any]:
    """Trainer and others read a model's signature to learn which columns it takes and which are labels."""

    @functools.wraps(model.forward)
    def forward(self: Adapter, *args: Any, **kwargs: Any) -> Any:
        return Adapter.forward(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__doc__": cls.__doc__, "__module__": cls.__module__})
