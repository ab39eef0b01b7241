"""What acts now: the plan in force, and what makes the next one.

Hooks never write to the base for longer than a call: parameters and attention implementations are swapped in for a
module's own call, or a forward, and put back, also when it fails.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import prefixes
from veneer.adapters.linears import Siblings
from veneer.adapters.memory import Memory, carried, carry
from veneer.adapters.plan import Plan
from veneer.adapters.whole import Out, Whole
from veneer.bases.fast import Fast
from veneer.deltas import Flow

Lower = Callable[[Flow], Plan]
"""Makes the plan of a forward."""

_BATCHED = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_features",
    "input_values",
)  # fmt: skip


@dataclass(eq=False)
class Execution:
    """The plan in force, and what makes the next one.

    A plan is made at the outermost call of a root and ends with it; an activation checkpoint, which recomputes parts
    of a forward during backward, keeps the plan that forward ran with. One thread at a time: others wait.
    """

    lower: Lower | None = None
    configs: Sequence[Any] = ()
    whole: Whole | None = None
    """All parameters of the model, to be swapped at once."""
    checkpointed: Sequence[Any] = ()
    """The modules that transformers may checkpoint."""
    fast: Fast | None = None
    """Faster forms of what the base computes, for when gradients are."""
    siblings: dict[str, Siblings] = field(default_factory=dict)
    """Linear maps that get the same input, by its name."""
    generating: int = 0
    flow: Flow = field(default_factory=Flow)
    """The forward that goes on; outside of one, what is known where modules are called by themselves."""
    _plan: Plan | None = None
    _calls: list[nn.Module] = field(default_factory=list)
    _attention: list[tuple[Any, str]] = field(default_factory=list)
    _out: Out = field(default_factory=list)
    _off: Callable[[], None] | None = None
    _lock: Any = field(default_factory=threading.RLock)

    @property
    def plan(self) -> Plan:
        """What the module that asks is to act by."""
        if self._plan is not None:
            return self._plan
        return self.lower(self.flow) if self.lower else Plan()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Pre-hook of the roots: make the plan at the outermost call."""
        self._lock.acquire()
        self._calls.append(module)
        if len(self._calls) == 1:
            self.flow = _flow(module, args, kwargs)
            self._plan = self.lower(self.flow) if self.lower else Plan()
            if self._plan.whole is not None and self.whole is not None:
                self._out = self.whole.swap_in(self._plan.whole)
            if self._plan.attention:
                self._attention = prefixes.switch_on(self.configs)
            if self.lower and self.fast is not None and torch.is_grad_enabled():
                self._off = self.fast.on()
            if self.lower and module.training:
                self._adopt_checkpoints()

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Post-hook of the roots, called after exceptions too, even before `enter`."""
        if not self._calls or self._calls[-1] is not module:
            return
        self._calls.pop()
        if not self._calls:
            if isinstance(self.flow.memory, Memory) and output is not None:
                carry(getattr(output, "past_key_values", None), self.flow.memory)
            Whole.swap_out(self._out)
            if self._off is not None:
                self._off()
                self._off = None
                self._forget()
            self._plan, self.flow = None, Flow()
            prefixes.switch_off(self._attention)
            self._attention = []
        self._lock.release()

    @contextlib.contextmanager
    def acting(self, lower: Lower | None) -> Iterator[None]:
        """Have forwards inside the block act by plans of ``lower``; None is the plain base."""
        with self._lock:
            before, self.lower = self.lower, lower
            try:
                yield
            finally:
                self.lower = before

    @contextlib.contextmanager
    def generation_of(self, model: nn.Module) -> Iterator[None]:
        """Know inside the block when the model generates, where a row may come several times in a batch (beams)."""
        own = getattr(model, "generate", None)

        def generate(*args: Any, **kwargs: Any) -> Any:
            self.generating += 1
            try:
                return own(*args, **kwargs)  # type: ignore[misc]
            finally:
                self.generating -= 1

        if own is None:
            yield
            return
        model.__dict__["generate"] = generate
        try:
            yield
        finally:
            del model.__dict__["generate"]

    @contextlib.contextmanager
    def part(self, plan: Plan) -> Iterator[None]:
        """Have the modules called inside the block act by another plan."""
        before, self._plan = self._plan, plan
        try:
            yield
        finally:
            self._plan = before

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager[None], ...]:
        """``context_fn`` for `torch.utils.checkpoint`: recompute with the plan the forward ran with."""
        return contextlib.nullcontext(), self._again(self.plan, self.flow)

    @contextlib.contextmanager
    def _again(self, plan: Plan, flow: Flow) -> Iterator[None]:
        before, self.flow = self.flow, flow
        switched = prefixes.switch_on(self.configs) if plan.attention else []
        off = self.fast.on() if self.fast is not None else None
        out = self.whole.swap_in(plan.whole) if plan.whole is not None and self.whole is not None else []
        try:
            with self.part(plan):
                yield
        finally:
            Whole.swap_out(out)
            if off is not None:
                off()
                self._forget()
            prefixes.switch_off(switched)
            self.flow = before

    def _forget(self) -> None:
        for siblings in self.siblings.values():
            siblings.forget()

    def _adopt_checkpoints(self) -> None:
        """Give checkpointing that somebody switched on in the model itself our contexts, without which a prefix would
        be missing in the recomputation."""
        for module in self.checkpointed:
            if not module.gradient_checkpointing:
                continue
            run = module._gradient_checkpointing_func
            if run.keywords.get("context_fn") != self.checkpoint_contexts:
                keywords = {**run.keywords, "use_reentrant": False, "context_fn": self.checkpoint_contexts}
                module._gradient_checkpointing_func = type(run)(run.func, *run.args, **keywords)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "flow")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, flow=Flow(), _lock=threading.RLock())


def install(execution: Execution, roots: Iterable[nn.Module]) -> list[Any]:
    """Hook the modules whose forward starts a step."""
    handles: list[Any] = []
    for root in roots:
        handles.append(root.register_forward_pre_hook(execution.enter, with_kwargs=True))
        handles.append(root.register_forward_hook(execution.leave, always_call=True))
    return handles


def _flow(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Flow:
    """What the arguments of a forward tell."""
    masks = (kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    mask, decoder_mask = (mask if isinstance(mask, Tensor) and mask.dim() == 2 else None for mask in masks)
    memory = None if module.training else carried(kwargs.get("past_key_values"))  # recomputation would count twice
    return Flow(_batch(args, kwargs), mask, decoder_mask, memory)


def _batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many rows a call has."""
    named = (kwargs.get(name) for name in _BATCHED)
    found = (value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1)
    first = next(found, None)
    return None if first is None else len(first)
