"""Distillation: learning what a teacher would have said, beside or in place of the labels.

    L = (1 − λ) · CE(y, p_s) + λ · T² · D(p_t, p_s),      p = softmax(logits / T)       (Hinton et al. 2015, §2)

    forward    D = KL(p_t ‖ p_s)                    the student covers all the teacher holds possible
    reverse    D = KL(p_s ‖ p_t)                    it keeps to what the teacher holds likely (Gu et al. 2024, §2)
    jsd        D = ½ KL(p_t ‖ m) + ½ KL(p_s ‖ m),   m = ½ (p_t + p_s)

T² keeps the gradients of D as large as those of the cross-entropy at any T. D is taken where the task takes its loss
(labelled tokens, or rows) and averaged over the same items. Teacher and student compute their logits for some items
at a time, again in the backward: ``[items, vocabulary]`` is never there as a whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.adapters import Adapter, Base
from veneer.adapters.files import base_name, read_record, weights_hash
from veneer.errors import AdapterFileError, ConfigError, FetchError, did_you_mean
from veneer.tasks import Outcome, Task, load_base, task_from_config
from veneer.tasks.base import Scores
from veneer.training.settings import DistillSettings

BASE = "base"
"""The teacher that is the adapter's own base, without the adapter."""
_NUMBERS = 1 << 24
"""Logits that are there at a time, of teacher and student each (64 MB in float32)."""


def divergence(student: Tensor, teacher: Tensor, kind: str, temperature: float = 1.0) -> Tensor:
    """T² · D of logits ``[n, classes]``, summed over n."""
    s, t = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))

    def kl(p: Tensor, q: Tensor) -> Tensor:
        """KL(p ‖ q) of logarithms; 0 · log 0 is 0 (what a teacher rules out it gives −∞)."""
        return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum()

    if kind == "forward":
        found = kl(t, s)
    elif kind == "reverse":
        found = kl(s, t)
    else:
        middle = torch.logaddexp(s, t) - math.log(2)
        found = (kl(t, middle) + kl(s, middle)) / 2
    return found * temperature**2


@dataclass
class Distillation:
    """The loss of a task beside that of a teacher.

    Attributes:
        task: whose loss it goes beside.
        settings: how.
        teacher: a model that takes the task's batches: another base's, another adapter, or the adapter's own base.
        base: the base under the teacher.
    """

    task: Task
    settings: DistillSettings
    teacher: nn.Module
    base: Base
    numbers: int = _NUMBERS

    @property
    def fingerprint(self) -> str:
        """Changes when the teacher does."""
        name = self.settings.teacher
        return weights_hash(name) if _is_adapter(name) else self.base.fingerprint

    def outcome(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outcome:
        """The mixed loss of a batch, and the student's hits."""
        return self._mixed(model, batch)[0]

    def apart(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """T² · D alone, summed over the items; no gradient."""
        with torch.no_grad():
            return self._mixed(model, batch)[1]

    def _mixed(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Outcome, Tensor]:
        with torch.no_grad(), self._teaching():
            teacher = self.task.scores(self.teacher, batch)
        student = self.task.scores(model, batch)
        size = max(1, self.numbers // max(student.classes, 1))
        sums: list[tuple[Tensor, ...]] = []
        for start in range(0, len(student.targets), size):
            part = slice(start, start + size)
            inputs = student.features[part], teacher.features[part], student.targets[part]
            if torch.is_grad_enabled() and len(student.targets) > size:
                sums.append(checkpoint(self._part, student, teacher, *inputs, use_reentrant=False))
            else:
                sums.append(self._part(student, teacher, *inputs))
        cross, apart, correct = (torch.stack(each).sum(0) for each in zip(*sums, strict=True))
        share = self.settings.weight
        items = torch.tensor(len(student.targets), device=cross.device)
        return Outcome((1 - share) * cross + share * apart, items, correct), apart.detach()

    def _part(self, student: Scores, teacher: Scores, mine: Tensor, others: Tensor, targets: Tensor) -> Any:
        """Cross-entropy, divergence and hits of some items, summed."""
        logits = student.logits(mine).float()
        with torch.no_grad():
            wanted = teacher.logits(others).float().to(logits.device)
        width = min(logits.shape[-1], wanted.shape[-1])  # some pad their vocabularies
        apart = divergence(logits[:, :width], wanted[:, :width], self.settings.divergence, self.settings.temperature)
        return F.cross_entropy(logits, targets, reduction="sum"), apart, (logits.argmax(-1) == targets).sum()

    @contextlib.contextmanager
    def _teaching(self) -> Iterator[None]:
        """The teacher as it is out of training, without dropout; and no adapter but the one it may be itself."""
        before = self.base.model.training
        self.base.model.eval()
        try:
            with self.base.using(None):
                yield
        finally:
            self.base.model.train(before)


@contextlib.contextmanager
def distilling(
    adapter: Adapter, task: Task, settings: DistillSettings | None, names: Sequence[str] | None = None
) -> Iterator[Distillation | None]:
    """The loss with the teacher that the settings ask for, if they do, who is there as long as the block lasts.

    Args:
        adapter: the student.
        task: what for.
        settings: how; None: not at all.
        names: of the tasks the rows are of, if they say.

    Raises:
        ConfigError: there is no such teacher, or none that could teach this: of another task, vocabulary or labels.
    """
    if settings is None:
        yield None
        return
    teacher, base = _teacher(adapter, task, settings.teacher)
    try:
        if isinstance(teacher, Adapter):
            _check_tasks(teacher, settings.teacher, names)
        yield Distillation(task, settings, teacher, base)
    finally:
        if base is adapter.base and isinstance(teacher, Adapter):
            base.detach(teacher.name)


def _teacher(adapter: Adapter, task: Task, name: str) -> tuple[nn.Module, Base]:
    base = adapter.base
    if name == BASE and not task.plain_base:
        raise ConfigError(
            f"distill.teacher: the base by itself cannot do {task.name}, so it has nothing to teach; give a trained "
            "adapter's folder."
        )
    if name == BASE:
        return base.model, base
    if _is_adapter(name):
        teacher = _adapter(name, adapter, task)
        return teacher, teacher.base
    if _looks_local(name):
        raise ConfigError(f"distill.teacher: there is no {name}.{_runs_beside(name)}")
    try:
        other = load_base(name, task=task.name, device=base.device)
    except FetchError as error:
        raise ConfigError(
            f"distill.teacher: there is no folder {name} here, and as a base it cannot be had: {error}"
        ) from error
    other.model.requires_grad_(False)
    _check_vocabulary(base, other, name)
    if not task.plain_base:
        _check_labels(task, other, name)
    return other.model, other


def _looks_local(name: str) -> bool:
    """Whether nothing is where a path leads, rather than a hub id or a catalogue name."""
    path = Path(name).expanduser()
    written = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return not path.exists() and (written or (len(path.parts) > 1 and path.parent.is_dir()))


def _runs_beside(name: str) -> str:
    beside = Path(name).expanduser().parent
    runs = sorted(each.name for each in beside.glob("*") if _is_adapter(str(each))) if beside.is_dir() else []
    return did_you_mean(Path(name).name, runs) or (f" Adapters in {beside}: {', '.join(runs)}." if runs else "")


def _is_adapter(name: str) -> bool:
    path = Path(name).expanduser()
    return path.is_dir() and any((path / each / "adapter_config.json").is_file() for each in (".", "adapter"))


def _adapter(folder: str, student: Adapter, task: Task) -> Adapter:
    """The teacher in a folder: over the student's own base if it was made for that, else over its own."""
    from veneer.tasks import load_adapter

    record = read_record(folder)
    about, own = record.get("task", {}), record.get("base", {})
    if about.get("name") not in (None, task.name):
        raise ConfigError(f"distill.teacher: {folder} was trained for {about['name']}, not for {task.name}.")
    theirs = _labels(task_from_config(about)) if about.get("name") else []
    if theirs != _labels(task):
        raise ConfigError(
            f"distill.teacher: {folder} tells {', '.join(theirs) or 'no labels'} apart, not {', '.join(_labels(task))}."
        )
    same = own.get("fingerprint") == student.base.fingerprint and own.get("quantized") == student.base.quantized
    try:
        if same:
            name = next(n for i in range(1000) if (n := f"teacher{i or ''}") not in student.base.adapters)
            teacher = student.base.load(folder, name)
        else:
            teacher = load_adapter(folder, device=student.base.device)
            _check_vocabulary(student.base, teacher.base, base_name(folder))
    except AdapterFileError as error:
        raise ConfigError(f"distill.teacher: {error}") from error
    teacher.requires_grad_(False)
    return teacher


def _check_tasks(teacher: Adapter, name: str, names: Sequence[str] | None) -> None:
    try:
        teacher.method.for_tasks(names)
    except ConfigError as error:
        raise ConfigError(
            f"distill.teacher: {name} is told at each row which task it is of, and must know it. {error}"
        ) from error


def _check_vocabulary(base: Base, other: Base, name: str) -> None:
    vocabularies = [each.tokenizer.get_vocab() if each.tokenizer is not None else None for each in (base, other)]
    if vocabularies[0] != vocabularies[1]:
        sizes = [f"{len(v):,} tokens" if v is not None else "no tokenizer" for v in vocabularies]
        raise ConfigError(
            f"distill.teacher: {name} has another vocabulary ({sizes[1]}) than {base.name} ({sizes[0]}), so what it "
            "says cannot be compared token by token; take a teacher of the same family."
        )


def _check_labels(task: Task, other: Base, name: str) -> None:
    told = getattr(other.model.config, "id2label", None) or {}
    labels = [str(told[index]) for index in sorted(told)]
    if other.missing & set(_head_parameters(other)) or labels != _labels(task):
        raise ConfigError(
            f"distill.teacher: {name} was not trained to tell {', '.join(_labels(task))} apart "
            f"(its labels: {', '.join(labels) or 'none'}); give a trained adapter's folder."
        )


def _labels(task: Task) -> list[str]:
    """In the order of the outputs; none where the task's outputs are tokens."""
    return list(task.describe().get("labels") or ())


def _head_parameters(base: Base) -> list[str]:
    return [f"{path}.{name}" for path, head in base.sites.heads.items() for name, _ in head.named_parameters()]
