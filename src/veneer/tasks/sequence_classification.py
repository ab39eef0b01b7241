"""Sequence classification: one label for a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer.adapters import Base
from veneer.data import Format
from veneer.errors import BaseError, DataError, did_you_mean
from veneer.tasks.base import Outcome, Scores, Task
from veneer.tasks.conditions import conditioned

if TYPE_CHECKING:
    from datasets import Dataset

MOST_LABELS = 1000


class SequenceClassification(Task):
    """Learn to give a text one of a set of labels."""

    name: ClassVar[str] = "sequence-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    kinds: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    formats: ClassVar[tuple[Format, ...]] = (Format.TEXT_LABEL,)
    asks_from: ClassVar[tuple[str, ...]] = ("text",)
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    item: ClassVar[str] = "rows"
    plain_base: ClassVar[bool] = False

    labels: tuple[str, ...] = Field(min_length=2)
    """The labels, in the order of the head's outputs."""

    @classmethod
    def for_rows(cls, rows: Dataset | None, base: Base | None, **settings: Any) -> Self:
        """With the labels the rows have, sorted.

        Raises:
            DataError: there are fewer than two, or implausibly many.
        """
        if rows is not None:
            cls.check_format(rows)
        if "labels" not in settings:
            if rows is None:
                raise DataError("Classification needs its labels, or data to take them from.")
            found = sorted({str(label) for label in rows["label"]})
            if not 2 <= len(found) <= MOST_LABELS:
                raise DataError(f"Classification needs 2 to {MOST_LABELS} different labels; the data has {len(found)}.")
            settings["labels"] = tuple(found)
        if "max_length" not in settings and base is not None:
            context = getattr(base.model.config, "max_position_embeddings", None) or 512
            settings["max_length"] = min(context, 512)
        return cls(**settings)

    def head(self, base: Base, *, seed: int) -> dict[str, dict[str, Tensor]]:
        """A fresh head: the architecture's own, its last linear map as wide as there are labels.

        Raises:
            BaseError: the base was loaded without such a head.
        """
        heads = base.sites.heads  # taken before anything was attached
        width = getattr(base.model.config, "num_labels", None)
        last = [
            path for path, module in heads.items() if isinstance(module, nn.Linear) and module.out_features == width
        ]
        if not last or type(base.model).__name__.find("SequenceClassification") < 0:
            raise BaseError(
                f"{type(base.model).__name__} has no classification head; load the base with "
                f'veneer.load_base(name, task="{self.name}").'
            )
        generator = torch.Generator().manual_seed(seed)
        std = getattr(base.model.config, "initializer_range", 0.02)
        values: dict[str, dict[str, Tensor]] = {}
        for path, module in heads.items():
            values[path] = {name: torch.zeros(p.shape) for name, p in module.named_parameters(recurse=False)}
            if path == last[-1]:
                values[path] = {name: torch.zeros(len(self.labels), *p.shape[1:]) for name, p in values[path].items()}
            for name, value in values[path].items():
                if name == "weight" and value.dim() > 1:
                    value.normal_(std=std, generator=generator)
                elif name == "weight":
                    value.fill_(1.0)  # a norm
        return values

    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
        """The text's tokens, cut at `max_length`, and the index of its label.

        Raises:
            DataError: the label is none of `labels`.
        """
        ids = tokenizer(row["text"])["input_ids"]
        kept = tokenizer(row["text"], truncation=True, max_length=self.max_length)["input_ids"]
        told = {"given": len(ids), "learned": 0, "truncated": len(kept) < len(ids)}
        return [{"input_ids": kept, "labels": self._index(row["label"]), **told}]

    def pieces(self, row: Mapping[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
        """The tokens of the text as text, and the label."""
        ids = tokenizer(row["text"], truncation=True, max_length=self.max_length)["input_ids"]
        return [(tokenizer.decode(ids), False), (f" → label {row['label']}", True)]

    def unknown_labels(self, rows: Dataset) -> dict[int, str]:
        """Those that are none of `labels`."""
        names = (str(label) for label in rows["label"])
        return {index: name for index, name in enumerate(names) if name not in self.labels}

    def name_outputs(self, config: Any) -> None:
        """The labels, and how many."""
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: index for index, label in enumerate(self.labels)}

    def collate(self, examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Pad on the right: ``input_ids``, ``attention_mask`` ``[rows, tokens]``; ``labels`` ``[rows]``."""
        ids = [{"input_ids": example["input_ids"]} for example in examples]
        batch = dict(tokenizer.pad(ids, padding_side="right", return_tensors="pt"))
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch

    def blank(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """Zeros, of the first label."""
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        labels = torch.zeros(rows, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def items(self, batch: Mapping[str, Tensor]) -> int:
        """Rows."""
        return len(batch["labels"])

    def outcome(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outcome:
        """Cross-entropy over the rows."""
        scores = self.scores(model, batch)
        logits, labels = scores.features, scores.targets
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return Outcome(loss, torch.tensor(len(labels)), (logits.detach().argmax(-1) == labels).sum())

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
        """The head's outputs, a row each."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        return Scores(logits, lambda part: part, logits.shape[-1], batch["labels"])

    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """The share of rows labelled rightly."""
        return {"accuracy": accuracy}

    def predict(
        self,
        model: nn.Module,
        base: Base,
        rows: Sequence[Mapping[str, Any]],
        *,
        batch_size: int = 64,
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """``{"label": …, "probabilities": {label: p}}`` for each row."""
        tokenizer = base.tokenizer
        for start in range(0, len(rows), batch_size):
            asked = rows[start : start + batch_size]
            batch = tokenizer(
                [row["text"] for row in asked],
                truncation=True,
                max_length=self.max_length,
                padding=True,
                padding_side="right",
                return_tensors="pt",
            ).to(base.device)
            with torch.no_grad(), conditioned(model, asked):
                shares = model(**batch).logits.float().softmax(-1).tolist()
            for row in shares:
                best = max(range(len(row)), key=row.__getitem__)
                yield {"label": self.labels[best], "probabilities": dict(zip(self.labels, row, strict=True))}

    def score(
        self, rows: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[float]]:
        """``accuracy``."""
        if any(row.get("label") is None for row in rows):
            return {}
        pairs = zip(rows, predictions, strict=True)
        return {"accuracy": [float(self._index(row["label"]) == self._index(got["label"])) for row, got in pairs]}

    def has_answer(self, row: Mapping[str, Any]) -> bool:
        """A label."""
        return row.get("label") is not None

    def commonest(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        """Always the commonest label."""
        labels = [self._index(row["label"]) for row in rows]
        best = max(set(labels), key=labels.count)
        return {"accuracy": [float(label == best) for label in labels]}

    def show(self, row: Mapping[str, Any], prediction: Mapping[str, Any]) -> tuple[str, str | None, str]:
        """The text, its label and the one given, with its probability."""
        given = str(prediction["label"])
        expected = None if row.get("label") is None else str(row["label"])
        return str(row["text"]), expected, f"{given} ({prediction['probabilities'][given]:.0%})"

    def _index(self, label: Any) -> int:
        name = str(label)
        if name in self.labels:
            return self.labels.index(name)
        some = ", ".join(self.labels[:10]) + (f" and {len(self.labels) - 10} more" if len(self.labels) > 10 else "")
        raise DataError(f"Label {label!r} is none of those learned: {some}.{did_you_mean(name, self.labels)}")
