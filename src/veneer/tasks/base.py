"""What a task is: how rows become model inputs, what is to be minimised, and what comes out in the end."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from veneer.adapters import Base
from veneer.data import Format, Tokens, detect
from veneer.data.formats import TASK
from veneer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_MAX_LENGTH = 1024
_ENCODING = "3"
"""To be raised when rows are encoded in another way, so that what an earlier version left in the cache is not used."""
_TOLD = ("row", "length", "given", "learned", "truncated")


@dataclass(frozen=True)
class Outcome:
    """A batch's loss, in sums, so that batches of any size add up exactly.

    Attributes:
        loss: summed over items (labelled tokens, or rows), a scalar that carries gradients.
        items: how many.
        correct: how many of them the model would have chosen.
    """

    loss: Tensor
    items: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Scores:
    """A batch's logits, to be computed for a part of the items at a time.

    Attributes:
        features: ``[items, …]``, what the logits are computed from.
        logits: computes those of some items, ``[n, classes]``, from their features.
        classes: how many.
        targets: ``[items]``, the classes they should be.
    """

    features: Tensor
    logits: Callable[[Tensor], Tensor]
    classes: int
    targets: Tensor


@dataclass(frozen=True)
class Prepared:
    """Rows turned into model inputs.

    Attributes:
        examples: one a row, or several for a long text, ``row`` being the index of theirs; none for a row with nothing
            left to learn.
        tokens: of the rows before any was cut.
        longest: tokens of the longest example.
    """

    examples: Dataset
    tokens: Tokens
    longest: int

    @property
    def truncated(self) -> int:
        """Rows cut at the longest length allowed."""
        return len(self.tokens.truncated)

    @property
    def dropped(self) -> int:
        """Rows with nothing left to learn."""
        return len(self.tokens.dropped)


class Task(BaseModel):
    """A task and its settings, kept with the adapter that is trained for it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: ClassVar[str]
    """What configs call it."""
    auto_class: ClassVar[str]
    """The transformers auto class that has its head."""
    kinds: ClassVar[tuple[str, ...]]
    """Kinds of base it suits, best first."""
    formats: ClassVar[tuple[Format, ...]]
    """Row formats it takes."""
    asks_from: ClassVar[tuple[str, ...]]
    """Columns a question may stand in."""
    peft_task_type: ClassVar[str]
    """peft's word for it."""
    item: ClassVar[str]
    """What its loss is averaged over, in plural."""
    by_token: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    """What of its batches has an entry a token, and is padded at the end."""
    plain_base: ClassVar[bool]
    """Whether the base can do it at all without being trained for it."""

    max_length: int = Field(DEFAULT_MAX_LENGTH, ge=2)
    """Longest input in tokens."""

    @classmethod
    @abstractmethod
    def for_rows(cls, rows: Dataset | None, base: Base | None, **settings: Any) -> Self:
        """The task with what can be told from the data (labels) and the base (its template).

        Raises:
            DataError: it doesn't take rows of this format.
        """

    def head(self, base: Base, *, seed: int) -> dict[str, dict[str, Tensor]]:
        """Initial values of the modules it trains in full, by path and parameter name; none by default."""
        return {}

    def name_outputs(self, config: Any) -> None:
        """Have the config of a model that holds this task's head say what its outputs are; nothing by default."""

    @abstractmethod
    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
        """Model inputs of one row, at least one: dicts with ``input_ids`` (empty if nothing to learn is left after
        cutting), ``labels``, ``truncated``, and the tokens of the whole row: those given and those to be learned, as
        ``given`` and ``learned``."""

    def faults(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[str]:
        """What is wrong with the way these rows are put to the model: ends that are not learned, turns that are not
        closed; none by default."""
        return []

    @abstractmethod
    def pieces(self, row: Mapping[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
        """A row as the model gets it, as text for people: pieces, and whether each is learned."""

    def unknown_labels(self, rows: Dataset) -> dict[int, str]:
        """Index of a row -> its label, for labels this task doesn't know."""
        return {}

    @abstractmethod
    def collate(self, examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """A batch of them."""

    @abstractmethod
    def blank(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """A batch of so many rows, each of so many tokens, all to be learned: for what depends on sizes alone."""

    @abstractmethod
    def items(self, batch: Mapping[str, Tensor]) -> int:
        """How many items of loss a batch holds (labelled tokens, or rows)."""

    @abstractmethod
    def outcome(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outcome:
        """Loss and hits of ``model`` (an adapter, or a plain base) on a batch."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
        """What ``model`` gives every class at each item `outcome` takes its loss at."""

    @abstractmethod
    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """What to report of a validation during training, from its mean loss and share of hits."""

    @abstractmethod
    def predict(
        self, model: nn.Module, base: Base, rows: Sequence[Mapping[str, Any]], **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Answers to rows, in their order."""

    @abstractmethod
    def score(
        self, rows: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[float]]:
        """Metric -> its value on each row, for rows that have an answer to compare with."""

    def sample(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a row to ask for a sample answer during training."""
        return row

    @abstractmethod
    def has_answer(self, row: Mapping[str, Any]) -> bool:
        """Whether a row says what the answer should be."""

    def commonest(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        """`score` of always giving the commonest answer: what to compare with where the plain base can't."""
        return {}

    @abstractmethod
    def show(self, row: Mapping[str, Any], prediction: Mapping[str, Any]) -> tuple[str, str | None, str]:
        """A row's question, the answer expected (if known) and the one given, as text for people."""

    def prepare(self, rows: Dataset, tokenizer: Any, *, allow_none: bool = False) -> Prepared:
        """Encode all rows, on disk where the rows are.

        Raises:
            DataError: the rows have a format this task does not take, or nothing is left of them (unless that is
                allowed).
        """
        self.check_format(rows)
        encoded = rows.map(
            _encode_batch,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            fn_kwargs={"task": self, "tokenizer": tokenizer},
            new_fingerprint=self._cache_key(rows, tokenizer),
            desc="Tokenizing",
        )
        told = {name: column[:] for name in _TOLD for column in [encoded.with_format("numpy")[name]]}
        kept = told["length"] > 0
        if not kept.any() and not allow_none:
            raise DataError(f"None of the {len(rows)} rows has anything to learn within {self.max_length} tokens.")
        _, firsts = numpy.unique(told["row"], return_index=True)  # a long text has several examples
        tokens = Tokens(
            given=told["given"][firsts],
            learned=told["learned"][firsts],
            truncated=told["row"][firsts][told["truncated"][firsts] & kept[firsts]],
            dropped=told["row"][firsts][~kept[firsts]],
            kept=int(told["length"].sum()),
            limit=self.max_length,
        )
        examples = encoded if kept.all() else encoded.select(numpy.flatnonzero(kept))
        columns = ["input_ids", "labels", "length", "row", *({TASK} & set(rows.column_names))]
        return Prepared(examples.select_columns(columns), tokens, int(told["length"].max()))

    @classmethod
    def check_format(cls, rows: Dataset) -> None:
        """Raises DataError if these rows are not for this task."""
        format = detect(rows.column_names)
        if format not in cls.formats:
            wanted = "; or ".join(", ".join(f.columns) for f in cls.formats)
            there = ", ".join(name for name in rows.column_names if not name.startswith("__"))
            raise DataError(f"Task {cls.name} takes rows with {wanted}, but these have {there}.")

    def describe(self) -> dict[str, Any]:
        """Itself as a plain mapping, for an adapter's files."""
        return {"name": self.name, "peft_task_type": self.peft_task_type, **self.model_dump(mode="json")}

    def _cache_key(self, rows: Dataset, tokenizer: Any) -> str:
        """What the encoded rows depend on: the rows, these settings, the tokenizer and its template, our encoding."""
        parts = [
            _ENCODING,
            rows._fingerprint,
            self.name,
            self.model_dump_json(),
            str(getattr(tokenizer, "chat_template", "")),
        ]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts.append(backend.to_str() if backend else repr(tokenizer))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _encode_batch(
    batch: Mapping[str, list[Any]], indices: Sequence[int], task: Task, tokenizer: Any
) -> dict[str, list[Any]]:
    names = ("input_ids", "labels", *_TOLD, *({TASK} & set(batch)))
    encoded: dict[str, list[Any]] = {name: [] for name in names}
    for index, *values in zip(indices, *batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        for example in task.encode(row, tokenizer):
            example |= {"length": len(example["input_ids"]), "row": index, TASK: row.get(TASK)}
            for name, column in encoded.items():
                column.append(example[name])
    return encoded
