"""A base that adapters can be attached to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.execution import Execution, SiteHooks, install
from veneer.bases import Pretrained
from veneer.errors import AdapterError, TargetError, UnknownName, did_you_mean
from veneer.methods import Method

_BANK = "veneer_adapters"


class Bank(nn.Module):
    """Holds the adapters inside the model, so that ``.to()`` and optimisers find them, but not its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_forget_missing)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: the model's state dict is the plain base's."""
        return {} if destination is None else destination

    def train(self, mode: bool = True) -> Bank:
        """Set the mode of the adapters, without their setting the base's in turn."""
        self.training = mode
        for adapter in self.children():
            nn.Module.train(adapter, mode)
        return self


def _forget_missing(bank: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if f"{_BANK}." not in key]


class Base(Pretrained):
    """A frozen pretrained model that carries any number of adapters.

    Attaching installs hooks and freezes the base; its weights, state-dict keys and module classes stay as they
    are, bit for bit. An attached adapter acts when it is called itself, inside ``using(name)``, or after
    ``activate(name)``; otherwise the base runs plain. Detaching the last one leaves no trace.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, **origin: Any) -> None:
        super().__init__(model, tokenizer, **origin)
        if hasattr(model, _BANK):
            raise AdapterError("This model already carries adapters of another Base; use that one.")
        self.adapters: Mapping[str, Adapter] = {}
        self.active: str | None = None
        self._execution = Execution()
        self._handles: dict[str, list[Any]] = {}
        self._was_trainable: list[nn.Parameter] = []

    def attach(
        self,
        method: Method,
        name: str = "default",
        *,
        modules: Mapping[str, Mapping[str, Tensor]] | None = None,
        task: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> Adapter:
        """Attach a new adapter.

        Args:
            method: what to attach, e.g. ``veneer.LoRA(rank=16)``.
            name: what to call it; letters, digits, ``_`` and ``-``.
            modules: modules that run on parameters of the adapter's own (a head): path -> name -> initial value.
            task: what the adapter is for, to be kept in its files.
            seed: of its random initial values. The global random state is left alone.

        Raises:
            AdapterError: the name is taken or not a name.
            TargetError: the method's targets match nothing.
        """
        self._check_name(name)
        sites = method.sites(self.sites)
        generator = torch.Generator().manual_seed(seed)
        values = {site.path: method.parameters(site, generator) for site in sites}
        adapter = Adapter.over(self.model)(self, name, method, sites, values, task or {})
        adapter.train(self.model.training)
        if not self.adapters:
            self._freeze()
        self._bank().add_module(name, adapter)
        self.adapters = {**self.adapters, name: adapter}
        self._hook(values)
        self.train_in_full(adapter, modules or {})
        return adapter

    def train_in_full(self, adapter: Adapter, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Let an attached adapter run modules (a task's head) on parameters of its own, with these initial values.

        Raises:
            TargetError: the adapter's method acts on one of them already.
        """
        if clash := {site.path for site in adapter.sites} & set(modules):
            raise TargetError(f"{', '.join(sorted(clash))} cannot be adapted and trained in full at once.")
        adapter.own_modules(modules)
        self._hook(modules)

    def detach(self, name: str) -> Adapter:
        """Take an adapter off; with the last one the model is as it was before the first.

        Returns:
            The adapter, whose parameters remain readable and can be saved.
        """
        adapter = self[name]
        delattr(self._bank(), name)
        self.adapters = {key: value for key, value in self.adapters.items() if key != name}
        if self.active == name:
            self.activate(None)
        self._execution.plan = {}
        used = {path for other in self.adapters.values() for path in (*other._at_sites, *other.modules_in_full)}
        for path in set(self._handles) - used:
            if path != "" or not self.adapters:
                for handle in self._handles.pop(path):
                    handle.remove()
        if not self.adapters:
            delattr(self.model, _BANK)
            self._thaw()
        return adapter

    def __getitem__(self, name: str) -> Adapter:
        """The adapter of that name.

        Raises:
            UnknownName: there is none.
        """
        if name not in self.adapters:
            attached = ", ".join(self.adapters) or "none"
            raise UnknownName(f"No adapter {name!r} here.{did_you_mean(name, self.adapters)} Attached: {attached}.")
        return self.adapters[name]

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[Base]:
        """Run the base with one adapter inside the block; None is the plain base."""
        with self._execution.acting(self[name].lower if name is not None else None):
            yield self

    def activate(self, name: str | None) -> None:
        """Run the base with one adapter from now on, also in code that knows nothing of veneer; None ends it."""
        self._execution.lower = self[name].lower if name is not None else None
        self._execution.plan = {}
        self.active = name

    def enable_checkpointing(self) -> None:
        """Recompute activations in backward instead of keeping them, with the plan the forward ran with.

        Raises:
            AdapterError: this architecture has no activation checkpointing in transformers.
        """
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise AdapterError(f"{type(self.model).__name__} has no activation checkpointing in transformers.")
        self._checkpointing("enable")({"use_reentrant": False, "context_fn": self._execution.checkpoint_contexts})

    def disable_checkpointing(self) -> None:
        """Undo `enable_checkpointing`."""
        self._checkpointing("disable")()

    def _checkpointing(self, what: str) -> Any:
        """transformers renames gradient checkpointing to activation checkpointing during its version 5."""
        new, old = f"activation_checkpointing_{what}", f"gradient_checkpointing_{what}"
        return getattr(self.model, new, None) or getattr(self.model, old)

    def load(self, folder: Any, name: str | None = None) -> Adapter:
        """Attach the adapter saved in a folder (ours or peft's).

        Args:
            folder: an adapter folder.
            name: what to call it; by default the folder's own name.

        Raises:
            AdapterFileError: the folder is no intact adapter.
            BaseMismatch: it was made for another base.
        """
        from veneer.adapters.files import load

        return load(self, folder, name)

    def _hook(self, paths: Iterable[str]) -> None:
        for path in paths:
            if path not in self._handles:
                module = self.model.get_submodule(path)
                self._handles[path] = SiteHooks(path, self._execution).install(module)

    def _check_name(self, name: str) -> None:
        if not name.replace("-", "_").replace("_", "a").isalnum() or not name.isascii():
            raise AdapterError(f"{name!r} is no adapter name; use letters, digits, '_' and '-'.")
        if name in self.adapters:
            raise AdapterError(f"An adapter {name!r} is attached already; detach it or choose another name.")

    def _bank(self) -> Bank:
        bank = getattr(self.model, _BANK)
        assert isinstance(bank, Bank)
        return bank

    def _freeze(self) -> None:
        self._was_trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        self.model.add_module(_BANK, Bank())
        self._handles[""] = install(self._execution, {self.model, self.backbone})

    def _thaw(self) -> None:
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        self._was_trainable = []
