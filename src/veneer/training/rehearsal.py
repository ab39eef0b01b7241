"""A training step without numbers: the very code of a step, run on shapes alone (`veneer.tracing`).

What a step holds and does is read off what really runs: the base's modules in their faster forms, the method's own
lowering, autograd, the optimiser. No method, architecture or task is known here by name, and a new one is told about
rightly without an edit. Nothing is loaded and nothing computed, so that a model of 405 billion weights costs what a
small one does.

Layers are alike, so a model of few of them is run twice, a period of layers apart, and all else follows in a line
(`along`): of each phase of a step the bytes of each kind, of the work the number of each operation. Whether the line
holds shows at the adapter's own bytes, which are known for the whole model.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from veneer.adapters import Adapter, Base
from veneer.bases.architecture import Architecture
from veneer.errors import ConfigError
from veneer.methods import Method
from veneer.tasks import TASKS, Task
from veneer.tracing import Ledger, Work, shapes_only

KINDS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace")
"""What memory is for: the base's parameters, the adapter's, their gradients and the optimiser's states; what is kept
for the backward; scores over the vocabulary; what is there for a moment."""


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
    """

    phases: Mapping[str, Mapping[str, float]]
    work: Mapping[Work, float]

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by kind at the moment of the step at which most is alive, and their ``total``."""
        most = max(self.phases.values(), key=lambda kinds: sum(kinds.values()))
        parts = {kind: max(round(most.get(kind, 0)), 0) for kind in KINDS}
        return {**parts, "total": sum(parts.values())}

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
        layers, period = self.architecture.layers, self.architecture.period
        depth = period
        while 2 * depth < layers:
            few, more = (self._traced(count, batch) for count in (depth, 2 * depth))
            found = along(few, more, (layers - depth) / depth)
            if abs(found.phases[""].get("adapter", 0) - adapter_bytes) < 1:
                return found
            depth *= 2  # it acts on some layers only: those at the ends, say
        return self._traced(layers, batch)

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
        with _unwatched(), ledger:
            ledger.enter([each for each in base.model.parameters() if id(each) not in own], "weights")
            ledger.enter([*adapter.parameters(), *adapter.buffers()], "adapter")
            for states in optimizer.state.values():
                ledger.enter([each for each in states.values() if isinstance(each, torch.Tensor)], "optimizer")
            for parameter in learned:
                parameter.register_post_accumulate_grad_hook(lambda each: ledger.enter([each.grad], "gradients"))
            with ledger.phase("forward", "activations"):
                loss = self._loss(adapter, inputs)
            with ledger.phase("backward", "workspace"):
                loss.backward()
            with ledger.phase("update", "workspace"):
                del loss
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
        return Step(ledger.peaks, Counter(ledger.work))

    def _loss(self, adapter: Adapter, inputs: Mapping[str, Any]) -> Any:
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


def along(few: Step, more: Step, times: float) -> Step:
    """The step ``times`` as far from the first as the second is, in a line."""

    def line(first: float, second: float) -> float:
        return first + (second - first) * times

    phases = {
        phase: {
            kind: line(kinds.get(kind, 0), more.phases[phase].get(kind, 0)) for kind in {*kinds, *more.phases[phase]}
        }
        for phase, kinds in few.phases.items()
    }
    work = {each: line(few.work.get(each, 0), more.work.get(each, 0)) for each in {*few.work, *more.work}}
    return Step(phases, work)


def served(architecture: Architecture, dtype: torch.dtype, batch: Batch) -> Step:
    """What reading a prompt and keeping its keys and values holds and does: the base alone, without gradients."""
    layers, depth = architecture.layers, architecture.period
    if 2 * depth >= layers:
        return _served(architecture, dtype, batch)
    few, more = (_served(architecture.with_layers(count), dtype, batch) for count in (depth, 2 * depth))
    return along(few, more, (layers - depth) / depth)


def _served(architecture: Architecture, dtype: torch.dtype, batch: Batch) -> Step:
    with rehearsing(batch.size, batch.size), torch.no_grad():
        model = architecture.build(dtype).eval()
        ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if architecture.kind == "decoder":
            inputs |= {"use_cache": True, "logits_to_keep": 1}  # as generation does
        if architecture.kind == "encoder-decoder":
            inputs |= {"use_cache": True, "decoder_input_ids": ids[:, :1]}
        ledger = Ledger(architecture.vocabulary)
        with _unwatched(), ledger:
            ledger.enter(model.parameters(), "weights")
            with ledger.phase("forward", "activations"):
                output = model(**inputs)
    cache = tree_leaves(tuple(getattr(output, "past_key_values", None) or ()))
    kept = sum(each.nbytes for each in cache if isinstance(each, torch.Tensor))
    kinds = ledger.peaks["forward"]
    kinds |= {"kv": kept, "activations": max(kinds.get("activations", 0) - kept, 0)}
    return Step({"forward": kinds}, Counter(ledger.work))


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
