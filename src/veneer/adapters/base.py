"""A base that adapters can be attached to."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.execution import Execution, Lower, install
from veneer.adapters.explicit import DisentangledHooks, RelativeHooks
from veneer.adapters.hooks import SiteHooks
from veneer.adapters.plan import Plan
from veneer.adapters.prefixes import AttentionHooks, PositionHooks
from veneer.adapters.split import SplitHooks
from veneer.adapters.virtual_tokens import TokenHooks
from veneer.adapters.whole import Whole
from veneer.bases import Pretrained
from veneer.bases.fast import Fast
from veneer.bases.weights import parameters_at
from veneer.deltas import Flow
from veneer.errors import AdapterError, TargetError, UnknownName, did_you_mean
from veneer.methods import BaseWeights, Method
from veneer.methods.base import State

_BANK = "veneer_adapters"
_ORIGIN = "veneer-origin"
_PREFIX = "adapter_"  # else an adapter called "train" would hide a method of nn.Module


NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What an adapter may be called."""


def by_row(condition: Any) -> Sequence[Any] | None:
    """Conditions one a row; None for one that is for all rows: nothing, a name, or a vector."""
    if isinstance(condition, Tensor):
        return list(condition) if condition.dim() > 1 else None
    if condition is None or isinstance(condition, str | int):
        return None
    if condition and isinstance(condition[0], int | float):
        return None
    return list(condition)


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
            raise AdapterError(
                "This model carries adapters of another Base already: use that one. (To copy a base with its adapters, "
                "copy the Base: copy.deepcopy(base).)"
            )
        self.adapters: Mapping[str, Adapter] = {}
        self.active: str | None = None
        self.checkpointing = False
        self._execution = Execution()
        self._handles: dict[str, list[Any]] = {}
        self._in_use: list[str | None] = []
        self._was_trainable: list[nn.Parameter] = []

    def attach(
        self,
        method: Method,
        name: str = "default",
        *,
        modules: Mapping[str, Mapping[str, Tensor]] | None = None,
        task: Mapping[str, Any] | None = None,
        seed: int = 0,
        loading: bool = False,
    ) -> Adapter:
        """Attach a new adapter.

        Args:
            method: what to attach, e.g. ``veneer.LoRA(rank=16)``.
            name: what to call it; letters, digits, ``_`` and ``-``.
            modules: modules that run on parameters of the adapter's own (a head): path -> name -> initial value.
            task: what the adapter is for, to be kept in its files.
            seed: of its random initial values. The global random state is left alone.
            loading: its values are overwritten by those of a file next, so that what they start from need not be there.

        Raises:
            AdapterError: the name is taken or not a name.
            ConfigError: the method has settings that only a training's end gives.
            TargetError: the method's targets match nothing.
        """
        if not isinstance(method, Method):
            raise AdapterError(
                f"attach() takes a method, e.g. veneer.LoRA(rank=16), not {method!r}. By name: "
                'veneer.methods.method_class("ia3")().'
            )
        self._check_name(name)
        if not loading:
            method.check_new()
        trained = [self._trained(origin) for origin in method.origins]
        method = method.over([each for each, _, _ in trained])
        weights = BaseWeights(self.model, self.tokenizer, task or {}, loading, self.original)
        method = method.on(weights)
        sites = method.sites(self.sites)
        generator = torch.Generator().manual_seed(seed)
        fresh = method.initial(sites, generator, weights)
        values, shared = method.started(fresh, method.shared(sites, generator, weights), trained)
        adapter = Adapter.over(self.model)(self, name, method, sites, values, shared, task or {})
        adapter.train(self.model.training)
        if not self.adapters:
            self._freeze()
        self._bank().add_module(_PREFIX + name, adapter)
        self.adapters = {**self.adapters, name: adapter}
        self._hook(adapter.places)
        self.train_in_full(adapter, modules or {})
        return adapter

    def _trained(self, origin: str) -> State:
        """What a new adapter starts from: an attached adapter, or one in a folder."""
        if origin in self.adapters:
            return self[origin].state
        self.load(origin, _ORIGIN)
        return self.detach(_ORIGIN).state

    def train_in_full(self, adapter: Adapter, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Let an attached adapter run modules (a task's head) on parameters of its own, with these initial values.

        Raises:
            TargetError: the adapter's method acts on one of them already.
        """
        if clash := set(adapter.places) & set(modules):
            raise TargetError(f"{', '.join(sorted(clash))} cannot be adapted and trained in full at once.")
        known = {path for path, _ in self.model.named_modules()}
        if missing := [path for path in modules if path not in known]:
            raise TargetError(
                f"{type(self.model).__name__} has no {', '.join(missing)} to train in full. Is it for another task? "
                "Load the base with that task: veneer.load_base(name, task=...)."
            )
        adapter.own_modules(modules)
        self._hook(modules)

    def detach(self, name: str) -> Adapter:
        """Take an adapter off; with the last one the model is as it was before the first.

        Returns:
            The adapter, whose parameters remain readable and can be saved.

        Raises:
            AdapterError: it is in use.
        """
        adapter = self[name]
        if name in self._in_use:
            raise AdapterError(f"{name!r} is in use; leave `with base.using({name!r})` before detaching it.")
        delattr(self._bank(), _PREFIX + name)
        self.adapters = {key: value for key, value in self.adapters.items() if key != name}
        if self.active == name:
            self.activate(None)
        used = {path for other in self.adapters.values() for path in other.places}
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
        if not isinstance(name, str) or name not in self.adapters:
            attached = ", ".join(self.adapters) or "none"
            near = did_you_mean(name, self.adapters) if isinstance(name, str) else " Give its name."
            raise UnknownName(f"No adapter {name!r} here.{near} Attached: {attached}.")
        return self.adapters[name]

    @contextlib.contextmanager
    def using(self, name: str | None, *, condition: Any = None) -> Iterator[Base]:
        """Run the base with one adapter inside the block; None is the plain base.

        Args:
            name: of the adapter.
            condition: what rows are told, as for `Adapter.conditioned`.

        Raises:
            UnknownName: there is no adapter of that name.
        """
        if name is not None and (conditions := by_row(condition)) is not None:
            with self.rows([name] * len(conditions), conditions=conditions):
                yield self
            return
        with self._execution.acting(self._lowering(name, condition)), self._using([name]):
            yield self

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None], *, conditions: Sequence[Any] | None = None) -> Iterator[Base]:
        """Run batches of ``len(names)`` rows inside the block, each row with its own adapter, or none.

        Kinds mix freely. Rows with None are computed as by the plain base. A generation with k beams, or k
        sequences a row, takes the names of the rows it is given.

        Args:
            names: of the adapters, one a row.
            conditions: the name of a task, a vector or None, one a row, for adapters that ask it.

        Raises:
            UnknownName: a name is not attached.
            AdapterError: there are no names; later, a batch has another number of rows.
        """
        if isinstance(names, str) or not names:
            raise AdapterError(f"rows() takes a list of names, one a row (None: the plain base), not {names!r}.")
        told = list(conditions) if conditions is not None else [None] * len(names)
        if len(told) != len(names):
            raise AdapterError(f"{len(told)} conditions are given for {len(names)} rows; give one a row.")
        chosen = {name: self[name] for name in names if name is not None}

        def lower(flow: Flow) -> Plan:
            rows = flow.rows
            times, rest = divmod(rows or len(names), len(names))
            if rest or (times != 1 and not self._execution.generating):
                raise AdapterError(
                    f"Adapters are given for {len(names)} rows, but the batch has {rows}. Give one name a row, None "
                    "for the plain base."
                )
            groups: dict[Any, list[int]] = {}  # rows with the same adapter and the same condition
            for index, (name, condition) in enumerate(zip(names, told, strict=True)):
                same = condition if condition is None or isinstance(condition, str) else index
                if name is not None:
                    groups.setdefault((name, same), []).append(index)
            plans = [
                (
                    [row * times + copy for row in rows_of for copy in range(times)],
                    Plan.of(chosen[name].lower(flow, condition=told[rows_of[0]])),
                )
                for (name, _), rows_of in groups.items()
            ]
            return Plan.by_rows(plans, len(names) * times, self.sites)

        with self._execution.acting(lower), self._execution.generation_of(self.model), self._using(names):
            yield self

    @contextlib.contextmanager
    def _using(self, names: Sequence[str | None]) -> Iterator[None]:
        before, self._in_use = self._in_use, [*self._in_use, *names]
        try:
            yield
        finally:
            self._in_use = before

    def activate(self, name: str | None) -> None:
        """Run the base with one adapter from now on, also in code that knows nothing of veneer; None ends it."""
        self._execution.lower = self._lowering(name)
        self.active = name

    def _lowering(self, name: str | None, condition: Any = None) -> Lower | None:
        if name is None:
            return None
        adapter = self[name]
        return lambda flow: Plan.of(adapter.lower(flow, condition=condition))

    def at_tokens(self, states: Tensor) -> Tensor:
        """States ``[rows, positions, …]`` inside a forward at the input's own tokens, without those of virtual ones."""
        places = self._execution.flow.places
        if places is None:
            return states
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def enable_checkpointing(self) -> None:
        """Recompute activations in backward instead of keeping them, with the plan the forward ran with.

        Raises:
            AdapterError: this architecture has no activation checkpointing in transformers.
        """
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise AdapterError(f"{type(self.model).__name__} has no activation checkpointing in transformers.")
        self._checkpointing("enable")({"use_reentrant": False, "context_fn": self._execution.checkpoint_contexts})
        self.checkpointing = True

    def disable_checkpointing(self) -> None:
        """Undo `enable_checkpointing`."""
        self._checkpointing("disable")()
        self.checkpointing = False

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
        """Install the hooks of these places that are not there yet."""
        attention = {site.path for site in self.sites.attention}
        for path in paths:
            if path in self._handles:
                continue
            module = self.model.get_submodule(path)
            hooks: list[Any] = [self._attention_hooks(path, module)] if path in attention else []
            if not hooks or next(module.parameters(recurse=False), None) is not None:
                hooks.append(SiteHooks(path, self._execution, self.sites.input_of(path)))
            self._handles[path] = [handle for each in hooks for handle in each.install(module)]

    def _attention_hooks(self, path: str, module: nn.Module) -> Any:
        """What brings a prefix into this attention module."""
        split = self.sites.splits.get(path)
        if split is None or not split.attention:
            return AttentionHooks(path, self._execution, self.sites.distances(path))
        kind = {"disentangled": DisentangledHooks, "relative": RelativeHooks}[split.attention]
        return kind(path, self._execution)

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise AdapterError(f"{name!r} is no adapter name; use letters, digits, '_' and '-'.")
        if name in self.adapters:
            raise AdapterError(f"An adapter {name!r} is attached already; detach it or choose another name.")

    def _bank(self) -> Bank:
        bank = getattr(self.model, _BANK)
        assert isinstance(bank, Bank)
        return bank

    def _freeze(self) -> None:
        self._was_trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._execution.whole = Whole(self.model, parameters_at(self.model, self.sites.whole))
        self.model.requires_grad_(False)
        self.model.add_module(_BANK, Bank())
        self._execution.configs = self._configs()
        self._execution.fast = Fast(self.model, self._execution.configs)
        # Generation calls the encoder of an encoder-decoder by itself.
        encoder, decoder = self._encoder_decoder()
        roots = {self.model, self.backbone, encoder, decoder, *self._towers()} - {None}
        handles = install(self._execution, roots)  # type: ignore[arg-type]
        modules = list(self.model.modules())
        self._execution.checkpointed = [module for module in modules if hasattr(module, "gradient_checkpointing")]
        if self.sites.token_embedding is not None:
            hooks = TokenHooks(self._execution)
            handles += hooks.install(encoder or self.model, self.sites.token_embedding, decoder)
        for path in self.sites.positions:
            handles += PositionHooks(path, self._execution).install(self.model.get_submodule(path))
        for path, split in self.sites.splits.items():
            handles += SplitHooks(path, split, self._execution).install(self.model.get_submodule(path))
        self._handles[""] = handles

    def _encoder_decoder(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The two halves of an encoder-decoder; None and None for everything else."""
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return None, None
        return self.model.get_encoder(), self.model.get_decoder()  # type: ignore[operator]

    def _towers(self) -> list[nn.Module]:
        """Models inside the model that are called by themselves (CLIP's for text and for images)."""
        config = type(getattr(self.model, "config", None))
        inner = (module for module in self.model.modules() if hasattr(module, "config") and module is not self.model)
        return [module for module in inner if type(module.config) is not config and hasattr(module, "main_input_name")]

    def _configs(self) -> list[Any]:
        """All config objects in the model, each once: every one of them names an attention implementation."""
        found = {id(config): config for module in self.model.modules() if (config := getattr(module, "config", None))}
        return [config for config in found.values() if hasattr(config, "_attn_implementation")]

    def _thaw(self) -> None:
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        self._was_trainable = []
