"""An adapter: a named instance of a method over a base, a module that owns its parameters and nothing else."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from veneer.adapters.trainers import Backbone, Trainable
from veneer.bases import Site
from veneer.bases.weights import parameters_of, stored
from veneer.deltas import Delta, Replace, Tokens
from veneer.errors import AdapterError
from veneer.methods import Lowering, Method

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
        self.base_model = Backbone(self._run_backbone)
        self._shared = self._own("", shared)
        self._at_sites = {path: self._own(path, tensors) for path, tensors in values.items()}
        self._modules_in_full: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def over(cls, model: nn.Module) -> type[Self]:
        """The adapter class for this class of model: the same, with the model's own ``forward`` signature."""
        return _with_signature_of(cls, type(model))  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base with this adapter; arguments and result are those of the base."""
        with self.acting():
            return self.base.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's ``generate`` with this adapter."""
        with self.acting():
            return self.base.model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Have the base run with this adapter inside the block."""
        with self.base.using(self.name):
            yield

    def lower(self, training: bool | None = None) -> dict[str, Delta]:
        """The deltas this adapter amounts to, by where they act; in its own mode unless told which."""
        step = Lowering(self.training if training is None else training, self.base.model)
        plan = {
            site.path: self.method.lower(site, {**self._shared, **self._at_sites[site.path]}, step)
            for site in self.sites
        }
        plan.update({path: Replace(values) for path, values in self._modules_in_full.items()})
        return plan

    def parameters_at(self, path: str) -> Mapping[str, Tensor]:
        """Its parameters at one site, by the method's names for them."""
        return self._at_sites[path]

    def own_modules(self, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over modules of the base: they run on parameters of this adapter, with these initial values."""
        self._modules_in_full.update({path: self._own(path, tensors) for path, tensors in modules.items()})

    @property
    def modules_in_full(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The modules (a task's head) that run on parameters of the adapter's own, by path."""
        return self._modules_in_full

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.base.model.config

    @property
    def device(self) -> torch.device:
        """Where the base and the adapter are."""
        return self.base.device

    @property
    def trainable(self) -> int:
        """How many numbers it trains."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def trainable_share(self) -> float:
        """The same as a share of the base's parameters."""
        return self.trainable / self.base.parameter_count

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return sum(p.nbytes for p in self.parameters())

    def merged(self) -> nn.Module:
        """A copy of the base model with this adapter folded into its weights. The base stays as it is."""
        plan = self.lower(training=False)
        base = copy.deepcopy(self.base)
        for name in base.adapters:
            base.detach(name)
        for path, delta in plan.items():
            module = base.model.get_submodule(path)
            with torch.no_grad():
                merged = stored(module, delta.merge_into(parameters_of(module)))
            for name, value in merged.items():
                module._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=False)
        return base.model

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

    def _run_backbone(self, *args: Any, **kwargs: Any) -> Any:
        if self._adds_tokens:
            raise AdapterError(
                "This adapter puts virtual tokens into the input, around the whole model; a trainer that calls the "
                "backbone by itself (TRL's do) would train nothing. Use veneer.train or transformers' Trainer."
            )
        with self.acting():
            return self.base.backbone(*args, **kwargs)

    @functools.cached_property
    def _adds_tokens(self) -> bool:
        return any(isinstance(delta, Tokens) for delta in self.lower(training=False).values())

    def _own(self, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Register tensors under the path peft gives them: floats as parameters, integers as buffers."""
        owned: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            *parents, leaf = (f"{PREFIX}{path}.{name}" if path else name).split(".")
            node: nn.Module = self
            for parent in parents:
                if parent not in node._modules:
                    node.add_module(parent, nn.Module())
                node = node._modules[parent]  # type: ignore[assignment]
            tensor = tensor.to(self.base.device)
            if tensor.is_floating_point():
                owned[name] = parameter = nn.Parameter(tensor)
                node.register_parameter(leaf, parameter)
            else:
                owned[name] = tensor
                node.register_buffer(leaf, tensor)
        return owned


@functools.cache
def _with_signature_of(cls: type[Adapter], model: type[nn.Module]) -> type[Any]:
    """Trainer and others read a model's signature to learn which columns it takes and which are labels."""

    @functools.wraps(model.forward)
    def forward(self: Adapter, *args: Any, **kwargs: Any) -> Any:
        return Adapter.forward(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__doc__": cls.__doc__, "__module__": cls.__module__})
