"""A plan: every method beside every other and beside full fine-tuning, on one base, for one machine.

    train memory      read off the step's own code, run on shapes (`veneer.training.rehearsal`)
    serve memory      base, adapter and what reading a prompt leaves in the cache of keys and values
    time              the step's operations, at the machine's rates (`veneer.planning.machine`)
    variants          one copy of the base and N adapters; or N whole copies, where an adapter is as large as the base

A quantised base's weights are counted analytically, from its maps' shapes: its steps are those of the plain base with
these weights, and one map at a time as it is dequantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from veneer.adapters import Adapter
from veneer.bases.architecture import Architecture, architecture
from veneer.bases.quantized import KINDS as QUANTIZED
from veneer.bases.quantized import chosen_maps, would_hold
from veneer.bases.sites import ALL_LINEAR, SiteMap
from veneer.errors import BaseError, ConfigError, VeneerError
from veneer.methods import Method, methods
from veneer.planning.machine import Machine, machine
from veneer.tasks import Task
from veneer.tracing import shapes_only
from veneer.training.allocator import gaps
from veneer.training.rehearsal import Batch, Rehearsal, Step, attached, served, task_for

_DTYPES = ("float32", "bfloat16", "float16")
GRAMS = 473.0
"""Of CO₂ a kilowatt-hour: the world's average of 2024 (Ember, Global Electricity Review 2025)."""
HEADROOM = 0.1
"""Share of the memory left free."""
Begin = Callable[[str, int], None]
"""Told what begins, and how many steps are left at most, with it."""


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        rows: how many.
        longest: tokens of the longest row, as far as rows are not cut.
        mean: of all.
        labelled: share of the tokens that carry loss.
        counted: whether the base's own tokenizer counted them; else four characters were taken for a token.
    """

    rows: int
    longest: int
    mean: float
    labelled: float
    counted: bool


@dataclass(frozen=True)
class Request:
    """What to plan for.

    Attributes:
        base: a hub id, folder, catalogue name, or well-known architecture.
        methods: which; all, each with its own settings, if none are given.
        batch: one pass of a step; where the data are known, the largest.
        passes: of a step.
        step_rows: of all of its passes; by default as many as these hold.
        checkpointing: whether activations are computed again.
        dtype: the base's; ``auto`` as it was published.
        quantize: ``nf4``, ``int8`` or None.
        device: name of another machine; None for this one.
        memory: bytes there are, if not all of the device's.
        variants: how many fine-tuned variants are to be kept.
        task: what is trained for; by default what the base suits best.
        serve: what is served at a time.
        data: what is trained on, if that is known.
        epochs: passes over it.
        max_steps: after which training stops anyway.
        watts: the machine draws when busy, if it is not the device's own figure.
    """

    base: str
    methods: Sequence[Method] = ()
    batch: Batch = field(default_factory=Batch)
    passes: int = 1
    step_rows: int | None = None
    checkpointing: bool = False
    dtype: str = "auto"
    quantize: str | None = None
    device: str | None = None
    memory: int | None = None
    variants: int = 100
    task: Task | None = None
    serve: Batch = field(default_factory=lambda: Batch(rows=1, tokens=2048))
    data: Data | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    watts: float | None = None

    @property
    def rows_of_a_step(self) -> int:
        """In all of its passes."""
        return self.step_rows or self.batch.rows * self.passes


@dataclass(frozen=True)
class Run:
    """A whole training.

    Attributes:
        steps: of the optimiser.
        seconds: they take, validations apart: rows come together by length, so that few tokens are padding.
        watt_hours: drawn, estimated from the machine's watts; None where nobody says these.
        co2_grams: of these, at the world's average (`GRAMS`).
    """

    steps: int
    seconds: float
    watt_hours: float | None
    co2_grams: float | None


@dataclass(frozen=True)
class MethodPlan:
    """What one method takes.

    Attributes:
        method: its name.
        settings: its own.
        trainable: numbers it trains.
        trainable_share: of the base's parameters.
        stored_bytes: of its tensors in a file (float32, of full fine-tuning too).
        train_memory: bytes by part at the moment of a step at which most is held, and their ``total``.
        serve_memory: the same of serving it.
        flops_per_token: of the products of a training step, forward and backward.
        seconds_per_step: all passes of a step; where the data are known, of rows as long as theirs are on average.
        variants_bytes: of as many variants as asked for; whole copies are in the base's dtype.
        copies: whether each variant is a whole copy of the base.
        fits: whether training does, with some room left.
        largest_batch: rows of a pass that would still fit.
        run: the whole training, where the data are known.
        basis: ``traced`` from the code's own shapes, or ``analytic`` where quantised weights are counted.
    """

    method: str
    settings: Mapping[str, Any]
    trainable: int
    trainable_share: float
    stored_bytes: int
    train_memory: Mapping[str, int]
    serve_memory: Mapping[str, int]
    flops_per_token: float
    seconds_per_step: float
    variants_bytes: int
    copies: bool
    fits: bool
    largest_batch: int
    run: Run | None
    basis: str


@dataclass(frozen=True)
class Plan:
    """The whole of it.

    Attributes:
        request: what was asked.
        base: facts of the base: ``parameters``, ``weight_bytes`` by dtype, ``full_fine_tuning_bytes`` as they are
            usually counted, by parameters alone.
        machine: what it is for.
        memory: bytes there are.
        methods: the table, in the order asked for.
        left_out: methods that can't act on this base, and why.
        notes: what was planned otherwise than asked for, and why.
    """

    request: Request
    base: Mapping[str, Any]
    machine: Machine
    memory: int
    methods: Sequence[MethodPlan]
    left_out: Mapping[str, str]
    notes: Sequence[str] = ()

    def named(self, method: str) -> MethodPlan | None:
        """The row of a method."""
        return next((row for row in self.methods if row.method == method), None)


def plan(request: Request, begin: Begin = lambda name, left: None) -> Plan:
    """Plan.

    Args:
        request: what for.
        begin: told each method as it begins.

    Raises:
        BaseError: there is no such base.
        UnknownName: there is no such device.
        ConfigError: the one method asked for can't act on the base.
    """
    plain = found = architecture(request.base)
    task = request.task or task_for(found)
    if task is not None:
        found = replace(found, auto_class=task.auto_class)
    room = found.positions
    if room is not None and request.batch.tokens > room:
        raise ConfigError(f"{request.base} takes rows of at most {room} tokens; {request.batch.tokens} are too many.")
    dtype = _dtype(request.dtype, found)
    place = machine(request.device, dtypes=(dtype,))
    notes = []
    if dtype == torch.bfloat16 and "bfloat16" not in place.rates:
        dtype = torch.float16
        notes.append(f"{place.name} has no bfloat16 units: planned in float16; train with dtype=float16 there")
    memory = request.memory or place.memory
    facts = _facts(plain, dtype, request.quantize)
    planner = _Planner(request, found, task, dtype, place, memory, facts)
    rows, left_out = [], {}
    wanted = request.methods or all_methods()
    for number, method in enumerate(wanted):
        begin(method.name, len(wanted) - number)
        try:
            rows.append(planner.row(method))
        except VeneerError as error:
            left_out[method.name] = str(error)
    if not rows:
        raise ConfigError(f"Nothing to plan on {request.base}: " + "; ".join(f"{k}: {v}" for k, v in left_out.items()))
    return Plan(request, facts, place, memory, rows, left_out, notes)


def all_methods() -> list[Method]:
    """Each with its own settings."""
    return [with_own_settings(cls) for cls in methods().values()]


def with_own_settings(cls: type[Method]) -> Method:
    """A method with its defaults; with those it gives as an example, where it can't do without any."""
    try:
        return cls()
    except ConfigError:
        return cls(**cls.example)


def _dtype(asked: str, found: Architecture) -> torch.dtype:
    if asked == "auto":
        return found.dtype
    dtype = getattr(torch, asked, None)
    if asked not in _DTYPES or not isinstance(dtype, torch.dtype):
        raise BaseError(f"{asked!r} is no dtype to plan with; use auto, {', '.join(_DTYPES)}.")
    return dtype


def _facts(found: Architecture, dtype: torch.dtype, quantize: str | None) -> dict[str, Any]:
    with torch.device("meta"):
        model = found.build(dtype)
    parameters = sum(each.numel() for each in model.parameters())
    sizes = {name: parameters * getattr(torch, name).itemsize for name in _DTYPES}
    sites = {site.path: site for site in SiteMap(model).resolve(ALL_LINEAR) if site.parameter is None}
    maps = [sites[path] for path in chosen_maps(model, list(sites))]
    shapes = [torch.Size((site.out_features, site.in_features)) for site in maps]
    rest = (parameters - sum(shape.numel() for shape in shapes)) * dtype.itemsize
    sizes |= {kind: rest + sum(would_hold(shape, kind) for shape in shapes) for kind in QUANTIZED}
    return {
        "name": found.name,
        "kind": found.kind,
        "layers": found.layers,
        "parameters": parameters,
        "dtype": quantize or str(dtype).removeprefix("torch."),
        "weight_bytes": sizes,
        "largest_map": max((shape.numel() for shape in shapes), default=0) * dtype.itemsize,
        "full_fine_tuning_bytes": {
            "sgd_16bit": 4 * parameters,  # weights and gradients
            "adam_16bit": 8 * parameters,  # and two moments
            "adam_mixed": 16 * parameters,  # weights and gradients in 16 bit; weights and two moments in 32
        },
    }


@dataclass(frozen=True)
class _Planner:
    request: Request
    architecture: Architecture
    task: Task | None
    dtype: torch.dtype
    machine: Machine
    memory: int
    base: Mapping[str, Any]

    def row(self, method: Method) -> MethodPlan:
        """Of one method."""
        request, batch = self.request, self.request.batch
        with shapes_only():
            adapter = attached(self.architecture, method, self.task, self.dtype)
            held = _held(adapter)
            trainable = adapter.trainable
            adapter.eval()
            lowered = sum(delta.nbytes for delta in adapter.lower(training=False).values())
            taken = adapter.positions
            adapter.settle()
            stored = sum(each.nbytes for each in adapter.state_dict().values())
        room = self.architecture.positions
        if room is not None:  # virtual tokens need places, too
            batch = replace(batch, tokens=min(batch.tokens, room - taken))
        rehearsal = Rehearsal(self.architecture, method, self.task, self.dtype, request.checkpointing)
        step = rehearsal.step(batch, held)
        memory = self._on_machine(step)
        whole = stored >= self.base["weight_bytes"][str(self.dtype).removeprefix("torch.")]
        weights = self.base["weight_bytes"][self.base["dtype"]]
        full = self.base["weight_bytes"][str(self.dtype).removeprefix("torch.")]
        seconds = self.machine.step(step.work, self.dtype) * self._passes(batch)
        return MethodPlan(
            method=method.name,
            settings=method.model_dump(mode="json"),
            trainable=trainable,
            trainable_share=trainable / self.base["parameters"],
            stored_bytes=stored,
            train_memory=memory,
            serve_memory=self._served(0 if whole else max(lowered, 0), taken),
            flops_per_token=step.flops / batch.size,
            seconds_per_step=seconds,
            variants_bytes=request.variants * full if whole else weights + request.variants * stored,
            copies=whole,
            fits=memory["total"] <= self.memory * (1 - HEADROOM),
            largest_batch=self._largest(memory),
            run=self._run(seconds),
            basis="analytic" if request.quantize else "traced",
        )

    def _passes(self, batch: Batch) -> float:
        """How many such passes take as long as a step."""
        request, data = self.request, self.request.data
        return request.passes if data is None else request.rows_of_a_step * data.mean / batch.size

    def _run(self, seconds: float) -> Run | None:
        request, data = self.request, self.request.data
        if data is None:
            return None
        steps = request.max_steps or math.ceil(data.rows * request.epochs / request.rows_of_a_step)
        seconds *= steps
        watts = request.watts or self.machine.watts
        hours = None if watts is None else watts * seconds / 3600
        return Run(steps, seconds, hours, None if hours is None else hours / 1000 * GRAMS)

    def _on_machine(self, step: Step) -> dict[str, int]:
        """With quantised weights, if asked for, and what the machine's allocator holds in gaps."""
        found = {part: value for part, value in step.memory.items() if part != "total"}
        if self.request.quantize is not None:
            found["weights"] = self.base["weight_bytes"][self.request.quantize]
            found["workspace"] += self.base["largest_map"]
        layers = max(self.architecture.layers, 1)
        found["gaps"] = gaps(step.passing, step.made / layers) if self.machine.heap else 0
        return found | {"total": sum(found.values())}

    def _largest(self, parts: Mapping[str, int]) -> int:
        """Rows that fit: what is held for a batch is taken to grow with it."""
        fixed = sum(parts[part] for part in ("weights", "adapter", "gradients", "optimizer"))
        each = max((parts["total"] - fixed) / self.request.batch.rows, 1)
        return max(int((self.memory * (1 - HEADROOM) - fixed) / each), 0)

    def _served(self, adapter: int, taken: int) -> dict[str, int]:
        request = self.request
        step = self._serving
        kinds = next(iter(step.phases.values()))
        parts = {name: round(kinds.get(name, 0)) for name in ("weights", "kv", "activations", "logits")}
        if request.quantize is not None:
            parts["weights"] = self.base["weight_bytes"][request.quantize]
            parts["activations"] += self.base["largest_map"]
        parts["kv"] += round(parts["kv"] * taken / self._prompt.tokens)
        parts["adapter"] = adapter
        return parts | {"total": sum(parts.values())}

    @cached_property
    def _serving(self) -> Step:
        return served(self.architecture, self.dtype, self._prompt)

    @property
    def _prompt(self) -> Batch:
        """What is served at a time, as far as the base takes it."""
        asked, room = self.request.serve, self.architecture.positions
        return asked if room is None else replace(asked, tokens=min(asked.tokens, room))


def _held(adapter: Adapter) -> int:
    """Bytes of all its tensors, shared ones once."""
    return sum(
        each.nbytes for each in {id(each): each for each in (*adapter.parameters(), *adapter.buffers())}.values()
    )
