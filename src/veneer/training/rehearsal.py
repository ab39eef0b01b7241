"""A training step without numbers: the very code of a step, run on shapes alone (`veneer.tracing`).

What a step holds and does is read off what really runs: the base's modules in their faster forms, the method's own
lowering, autograd, the optimiser. No method, architecture or task is known here by name, and a new one is told about
rightly without an edit. Nothing is loaded and nothing computed, so that a model of 405 billion weights costs what a
small one does.

Layers are alike, so a model of few of them is run twice, a period of layers apart, and all else follows in a line
(`along`): of the work the number of each operation; of every moment of a step, not of its peak alone, the bytes of each
kind. For which moment is the peak may change with depth: in the shallow model it may be that of the virtual tokens'
own network, in the whole one the end of the forward. Whether the line holds shows at the adapter's own bytes, which are
known for the whole model; else more layers are taken, in the end all.
"""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from veneer.adapters import Adapter, Base
from veneer.bases.architecture import Architecture
from veneer.errors import ConfigError
from veneer.methods import Method
from veneer.tasks import TASKS, Task
from veneer.tracing import Ledger, Moment, Work, shapes_only

KINDS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace")
"""What memory is for: the base's parameters, the adapter's, their gradients and the optimiser's states; what is kept
for the backward; scores over the vocabulary; what is there for a moment."""

ROUNDED = 1e-5
"""Share of its bytes by which a share of all entries, rounded to whole ones, may be off the line."""


@dataclass(frozen=True)
class Batch:
    """What one pass of a step is given.

    Attributes:
        rows: of the batch.
        tokens: of each row, virtual ones apart.
        labelled: share of the tokens that carry loss.
    """

    rows: int = 8
    tokens: int = 512
    labelled: float = 1.0

    @property
    def size(self) -> int:
        """Tokens in all."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Step:
    """What a step comes to.

    Attributes:
        phases: phase -> bytes by kind, at the moment of it at which most is alive.
        work: the operations, and how many times each is done.
        moments: phase -> all of them, where the model itself was traced.
        made: bytes of all that is made in it.
    """

    phases: Mapping[str, Mapping[str, float]]
    work: Mapping[Work, float]
    moments: Mapping[str, Sequence[Moment]] = field(default_factory=dict)
    made: float = 0.0

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by kind at the moment of the step at which most is alive, and their ``total``."""
        most = max(self.phases.values(), key=lambda kinds: sum(kinds.values()))
        parts = {kind: max(round(most.get(kind, 0)), 0) for kind in KINDS}
        return {**parts, "total": sum(parts.values())}

    @property
    def passing(self) -> int:
        """Bytes that are gone when the step is over, at that moment."""
        return sum(self.memory[kind] for kind in ("activations", "logits", "workspace"))

    @property
    def flops(self) -> float:
        """Of its products, a multiply-add counted as two."""
        return sum(work.flops * times for work, times in self.work.items())


@contextlib.contextmanager
def rehearsing(tokens: int, labelled: int) -> Iterator[None]:
    """`shapes_only`, with masks as in a real step: transformers keeps them whole where it sees fake tensors, as for
    graphs that are to serve any mask; here the question whether all is seen has an answer."""
    from transformers import masking_utils

    usual = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        with shapes_only(tokens=tokens, labelled=labelled):
            yield
    finally:
        masking_utils.is_tracing = usual


def task_for(architecture: Architecture) -> Task | None:
    """The task a base of this kind suits best, with two labels where it needs labels; None if there is none."""
    fitting = [task for task in TASKS.values() if architecture.kind in task.kinds]
    chosen = min(fitting, key=lambda task: task.kinds.index(architecture.kind), default=None)
    if chosen is None:
        return None
    given = {"labels": ("no", "yes")} if "labels" in chosen.model_fields else {}
    return chosen.for_rows(None, None, **given)


@dataclass(frozen=True)
class Rehearsal:
    """One method on one base, for steps of one kind.

    Attributes:
        architecture: of the base, with the head the task needs.
        method: what is trained.
        task: what for; None: the loss the model itself computes.
        dtype: the base's.
        checkpointing: whether activations are computed again.
    """

    architecture: Architecture
    method: Method
    task: Task | None
    dtype: torch.dtype
    checkpointing: bool = False

    def step(self, batch: Batch, adapter_bytes: int) -> Step:
        """What a step of the whole model holds and does.

        Args:
            batch: one pass.
            adapter_bytes: of the adapter's parameters on the whole model.

        Raises:
            AdapterError: the architecture has no checkpointing, and it is asked for.
        """
        found = deepened(lambda count: self._traced(count, batch), self.architecture, adapter_bytes)
        return found or self._traced(self.architecture.layers, batch)

    def _traced(self, layers: int, batch: Batch) -> Step:
        shallow = replace(self, architecture=self.architecture.with_layers(layers))
        with rehearsing(batch.size, max(round(batch.size * batch.labelled), 1)):
            return shallow._run(batch)

    def _run(self, batch: Batch) -> Step:
        adapter = attached(self.architecture, self.method, self.task, self.dtype)
        base = adapter.base
        if self.checkpointing:
            base.enable_checkpointing()
        adapter.train()
        learned = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, fused=True)
        for parameter in learned:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # its states are there from the first step on
        optimizer.zero_grad()
        own = {id(each) for each in (*adapter.parameters(), *adapter.buffers())}
        inputs = blank(self.task, self.architecture, batch)
        ledger = Ledger(self.architecture.vocabulary)
        with _unwatched(), ledger, ledger.shortened():
            ledger.enter([each for each in base.model.parameters() if id(each) not in own], "weights")
            ledger.enter([*adapter.parameters(), *adapter.buffers()], "adapter")
            for states in optimizer.state.values():
                ledger.enter([each for each in states.values() if isinstance(each, torch.Tensor)], "optimizer")
            for parameter in learned:
                parameter.register_post_accumulate_grad_hook(lambda each: ledger.enter([each.grad], "gradients"))
            with ledger.phase("forward", "activations"):
                loss = self.loss(adapter, inputs)
            with ledger.phase("backward", "workspace"):
                loss.backward()
            with ledger.phase("update", "workspace"):
                del loss
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
        return _step(ledger)

    def loss(self, adapter: Adapter, inputs: Mapping[str, Any]) -> Any:
        """Of a batch, the mean over its items."""
        if self.task is None:
            return adapter(**inputs, use_cache=False).loss
        outcome = self.task.outcome(adapter, inputs)
        return outcome.loss / outcome.items


def attached(architecture: Architecture, method: Method, task: Task | None, dtype: torch.dtype) -> Adapter:
    """The method on the base, with the task's head; on the device, or the shapes, of the moment.

    Raises:
        VeneerError: the method can't act on this base.
    """
    base = Base(architecture.build(dtype), None, name=architecture.name)
    head = task.head(base, seed=0) if task is not None else {}
    adapter = base.attach(method, "planned", modules=head, loading=True)
    if not adapter.trainable:
        raise ConfigError(f"{method.name} has nothing to train here.")
    return adapter


def blank(task: Task | None, architecture: Architecture, batch: Batch) -> dict[str, torch.Tensor]:
    """The inputs of a batch."""
    if task is not None:
        return task.blank(batch.rows, batch.tokens)
    ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def deepened(
    traced: Callable[[int], Step], architecture: Architecture, adapter_bytes: int | None = None
) -> Step | None:
    """The step of the whole model, told by few layers; None where only the whole model tells it.

    Args:
        traced: the step of so many layers.
        architecture: of the whole model.
        adapter_bytes: of the adapter on the whole model, if there is one.
    """
    layers, period = architecture.layers, architecture.period
    depth = 2 * period  # the first and the last may be of their own kind: one layer would be both
    while 2 * depth + period < layers:
        found = along(traced(depth), traced(depth + period), (depth, depth + period, layers))
        held = found.phases[""].get("adapter", 0)
        if adapter_bytes is None or math.isclose(held, adapter_bytes, rel_tol=ROUNDED):
            return found
        depth *= 2
    return None


def along(few: Step, more: Step, depths: tuple[int, int, int]) -> Step:
    """The step of a third depth, in a line with those of two.

    Args:
        few: traced with the first of these depths.
        more: traced with the second.
        depths: layers of either, and of the model that is asked for.
    """
    first, second, whole = depths
    times = (whole - first) / (second - first)

    def line(one: float, other: float) -> float:
        return one + (other - one) * times

    phases = {}
    for phase, there in few.moments.items():
        pairs = _pairs(there, more.moments[phase])
        one, other = max(pairs, key=lambda pair: line(pair[0].total, pair[1].total))
        kinds = {*one.alive, *other.alive}
        phases[phase] = {kind: line(one.alive.get(kind, 0), other.alive.get(kind, 0)) for kind in kinds}
    work = {each: line(few.work.get(each, 0), more.work.get(each, 0)) for each in {*few.work, *more.work}}
    return Step(phases, work, made=line(few.made, more.made))


def _pairs(few: Sequence[Moment], more: Sequence[Moment]) -> Iterator[tuple[Moment, Moment]]:
    """The same moments in both: of those at which the same operation made as much, the first, the last, and that at
    which most was alive. From layer to layer what is alive grows or falls steadily, so that none between holds more."""
    ours, theirs = _alike(few), _alike(more)
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    rest = _by_name(ours, theirs), _by_name(theirs, ours)
    for name in rest[0].keys() & rest[1].keys():  # tensors for all layers at once are larger in the deeper
        pairs += zip(rest[0][name], rest[1][name], strict=False)
    for one, other in pairs:
        yield one[0], other[0]
        yield one[-1], other[-1]
        yield max(one, key=lambda each: each.total), max(other, key=lambda each: each.total)


def _alike(moments: Sequence[Moment]) -> dict[tuple[str, int], list[Moment]]:
    found: dict[tuple[str, int], list[Moment]] = {}
    for each in moments:
        found.setdefault((each.name, each.nbytes), []).append(each)
    return found


def _by_name(
    ours: Mapping[tuple[str, int], list[Moment]], theirs: Mapping[tuple[str, int], list[Moment]]
) -> dict[str, list[list[Moment]]]:
    """Those that the other has not, by operation."""
    found: dict[str, list[list[Moment]]] = {}
    for key, moments in ours.items():
        if key not in theirs:
            found.setdefault(key[0], []).append(moments)
    return found


def served(architecture: Architecture, dtype: torch.dtype, batch: Batch) -> Step:
    """What reading a prompt and keeping its keys and values holds and does: the base alone, without gradients."""
    kept: dict[int, int] = {}

    def traced(layers: int) -> Step:
        found, kept[layers] = _served(architecture.with_layers(layers), dtype, batch)
        return found

    step = deepened(traced, architecture) or traced(architecture.layers)
    if architecture.layers in kept:
        cache: float = kept[architecture.layers]
    else:
        (first, one), (second, other) = sorted(kept.items())[-2:]
        cache = one + (other - one) * (architecture.layers - first) / (second - first)
    kinds = dict(step.phases["forward"])
    kinds |= {"kv": cache, "activations": max(kinds.get("activations", 0) - cache, 0)}
    return Step({"forward": kinds}, step.work)


def _served(architecture: Architecture, dtype: torch.dtype, batch: Batch) -> tuple[Step, int]:
    """The step, and bytes of its keys and values, which count as activations there."""
    with rehearsing(batch.size, batch.size), torch.no_grad():
        model = architecture.build(dtype).eval()
        ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if architecture.kind == "decoder":
            inputs |= {"use_cache": True, "logits_to_keep": 1}  # as generation does
        if architecture.kind == "encoder-decoder":
            inputs |= {"use_cache": True, "decoder_input_ids": ids[:, :1]}
        ledger = Ledger(architecture.vocabulary)
        with _unwatched(), ledger, ledger.shortened():
            ledger.enter(model.parameters(), "weights")
            with ledger.phase("forward", "activations"):
                output = model(**inputs)
    cache = tree_leaves(tuple(getattr(output, "past_key_values", None) or ()))
    return _step(ledger), sum(each.nbytes for each in cache if isinstance(each, torch.Tensor))


def _step(ledger: Ledger) -> Step:
    made = sum(each.nbytes for there in ledger.moments.values() for each in there)
    return Step(ledger.peaks, Counter(ledger.work), ledger.moments, made)


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """Tensors die by their counts, as in a real step, not at the garbage collector's moments."""
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.enable()
