"""Causal language modelling: going on with a text, or answering in it.

Loss on the answers only, and always on the token that ends them. A row is cut into segments, given ones and
learned ones, each tokenised by itself: then the tokens of a prompt are the very same in training as in
generation, where the prompt stands alone.

    messages / prompt, completion   the template's text around each turn is given, the assistant's turns are learned
    text                            all of it is learned; long texts go into several examples, none is cut off
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer.adapters import Base
from veneer.data import Format
from veneer.tasks.base import DEFAULT_MAX_LENGTH, Outcome, Scores, Task
from veneer.tasks.chat import Segment, chat_segments, content_of, messages_of
from veneer.tasks.conditions import conditioned
from veneer.tasks.output_head import acted_on, logits_at, loss_at, output_projection, taking_hidden

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""Label of a token that carries no loss; cross_entropy's own default."""


_UNLIMITED = 1 << 30


class CausalLM(Task):
    """Learn to go on with a text, or to answer prompts."""

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    formats: ClassVar[tuple[Format, ...]] = (Format.MESSAGES, Format.PROMPT_COMPLETION, Format.TEXT)
    asks_from: ClassVar[tuple[str, ...]] = ("prompt", "messages", "text")
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    item: ClassVar[str] = "tokens"
    by_token: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "labels")
    plain_base: ClassVar[bool] = True

    template: Literal["chat", "plain"] = "chat"
    """chat: prompts are put as the base's own chat template has them; plain: as they stand."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer when generating."""

    @classmethod
    def for_rows(cls, rows: Dataset | None, base: Base | None, **settings: Any) -> Self:
        """Chat where the base has a chat template, else plain; answers half again as long as those to learn."""
        if rows is not None:
            cls.check_format(rows)
        tokenizer = base.tokenizer if base is not None else None
        if "template" not in settings and not getattr(tokenizer, "chat_template", None):
            settings["template"] = "plain"
        if "max_length" not in settings and base is not None:
            context = getattr(base.model.config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
            settings["max_length"] = min(context, DEFAULT_MAX_LENGTH)
        if "max_new_tokens" not in settings and rows is not None and tokenizer is not None:
            answers = [answer for row in rows.select(range(min(len(rows), 1000))) if (answer := cls.expected(row))]
            longest = max((len(ids) for ids in tokenizer(answers)["input_ids"]), default=0) if answers else 0
            settings["max_new_tokens"] = max(longest * 3 // 2 + 8, 32)
        return cls(**settings)

    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
        """One example, or several for a long plain text; an empty one if nothing to learn is left after cutting."""
        if _is_text(row):
            return self._encode_text(row["text"], tokenizer)
        ids, labels = self._tokens(self._segments(row, tokenizer), tokenizer)
        learned = sum(label != IGNORED for label in labels)
        told = {"given": len(ids) - learned, "learned": learned, "truncated": len(ids) > self.max_length}
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):  # the first token is predicted from nothing
            ids = labels = []
        return [{"input_ids": ids, "labels": labels, **told}]

    def faults(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[str]:
        """Ends that carry no loss, and turns of the assistant that the template does not close."""
        end = tokenizer.eos_token_id
        if end is None:
            return [
                "the base's tokenizer has no end token, so answers would never end; set one: "
                "tokenizer.eos_token in tokenizer_config.json"
            ]
        whole = self.model_copy(update={"max_length": _UNLIMITED})
        added = getattr(tokenizer, "added_tokens_decoder", {})
        closing = {end, *tokenizer.all_special_ids, *(token for token, of in added.items() if of.special)}
        unlearned = unclosed = 0
        for row in rows:
            labels = whole.encode(row, tokenizer)[0]["labels"]
            unlearned += labels[-1:] != [end]
            turns = 0 if _is_text(row) else sum(turn["role"] == "assistant" for turn in messages_of(row))
            unclosed += turns > 1 and sum(not closing.isdisjoint(run) for run in _stretches(labels)) < turns
        told = []
        if unlearned:
            told.append(f"the end token {tokenizer.eos_token} carries no loss in {unlearned} of {len(rows)} rows")
        if unclosed:
            told.append(
                f"the base's chat template does not close the assistant's turns with an end token ({unclosed} of "
                f"{len(rows)} rows have several), so answers would run on; use a template that does "
                "(tokenizer.chat_template), or rows with one answer each"
            )
        return told

    def pieces(self, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """The row's tokens as text, cut where learning begins and ends."""
        example = self.encode(row, tokenizer)[0]
        marked = zip(example["input_ids"], example["labels"], strict=True)
        runs = itertools.groupby(marked, key=lambda pair: pair[1] != IGNORED)
        return [(tokenizer.decode([token for token, _ in run]), learned) for learned, run in runs]

    def collate(self, examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Pad on the right: ``input_ids``, ``attention_mask``, ``labels``, each ``[rows, tokens]``."""
        longest = max(len(example["input_ids"]) for example in examples)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        filled = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
        batch: dict[str, list[list[int]]] = {name: [] for name in filled}
        for example in examples:
            row = {**example, "attention_mask": [1] * len(example["input_ids"])}
            for name, fill in filled.items():
                batch[name].append([*row[name], *[fill] * (longest - len(row[name]))])
        return {name: torch.tensor(rows) for name, rows in batch.items()}

    def blank(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """Zeros."""
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def items(self, batch: Mapping[str, Tensor]) -> int:
        """Labelled tokens; the first of a row is predicted from nothing and doesn't count."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def outcome(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outcome:
        """Cross-entropy at the labelled tokens; logits are computed nowhere else, and where possible never at once."""
        labelled, targets = _labelled(batch)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        run = functools.partial(model, **inputs)
        if (found := loss_at(model, run, labelled, targets)) is not None:
            return Outcome(found[0], labelled.sum(), found[1])
        logits = logits_at(model, run, labelled)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        correct = (logits.detach().argmax(-1) == targets).sum()
        return Outcome(loss, labelled.sum(), correct)

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
        """From the hidden states at the labelled tokens, by the model's output projection; from all logits there where
        the model does more to them than that, or an adapter has a projection of its own."""
        labelled, targets = _labelled(batch)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        head = output_projection(model)
        if head is not None and not acted_on(head, model):
            with taking_hidden(head, model, labelled) as taken:
                first = model(**inputs).logits
            if taken:
                with torch.no_grad():
                    alone = head(taken[0][:1])
                if torch.equal(alone.float(), first.float()):
                    return Scores(taken[0], head, first.shape[-1], targets)
        logits = logits_at(model, functools.partial(model, **inputs), labelled)
        return Scores(logits, lambda part: part, logits.shape[-1], targets)

    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """Perplexity, and the share of tokens that would have been chosen."""
        return {"perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}

    def prompt_tokens(self, row: Mapping[str, Any], tokenizer: Any) -> list[int]:
        """The tokens generation starts from: the row without the answer that ends it, if one does."""
        if "messages" not in row and "prompt" not in row:
            ids: list[int] = tokenizer(row["text"])["input_ids"]
            return ids[-self.max_length :]
        if self.template == "plain" and "messages" not in row:
            segments = [(content_of(row["prompt"]), False)]
        else:
            turns = messages_of(row)
            segments = chat_segments(turns[:-1] if turns[-1]["role"] == "assistant" else turns, tokenizer)
        return self._tokens(segments, tokenizer)[0]

    def predict(
        self,
        model: nn.Module,
        base: Base,
        rows: Sequence[Mapping[str, Any]],
        *,
        batch_size: int = 16,
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """``{"output": text, "finished": bool}`` for each row; unfinished answers were cut at `max_new_tokens`.

        Greedy, unless ``options`` (of transformers' ``generate``) say otherwise.
        """
        tokenizer = base.tokenizer
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False, **options}
        end = base.model.generation_config.eos_token_id  # type: ignore[union-attr]
        ends = torch.tensor(end if isinstance(end, list) else [end if end is not None else -1], device=base.device)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = [self.prompt_tokens(row, tokenizer) for row in batch]
            with torch.no_grad(), conditioned(model, batch):
                outputs = model.generate(**_left_padded(prompts, tokenizer, base.device), **settings)  # type: ignore[operator]
            length = max(len(prompt) for prompt in prompts)
            for output in outputs:
                answer = output[length:]
                finished = len(answer) < settings["max_new_tokens"] or bool(torch.isin(answer[-1], ends))
                yield {"output": tokenizer.decode(answer, skip_special_tokens=True).strip(), "finished": finished}

    def score(
        self, rows: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[float]]:
        """``exact_match``; and ``json_match`` where all expected answers are JSON: equal as values, not as text."""
        expected = [self.expected(row) for row in rows]
        if any(answer is None for answer in expected):
            return {}
        answers = [str(prediction["output"]) for prediction in predictions]
        pairs = [(str(want).strip(), got.strip()) for want, got in zip(expected, answers, strict=True)]
        scores = {"exact_match": [float(want == got) for want, got in pairs]}
        if all(parsed(want) is not None for want, _ in pairs):
            scores["json_match"] = [float(parsed(want) == parsed(got)) for want, got in pairs]
        return scores

    def commonest(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        """Always the commonest answer."""
        expected = [self.expected(row) for row in rows]
        answer = Counter(str(each) for each in expected).most_common(1)[0][0]
        return self.score(rows, [{"output": answer}] * len(rows))

    def has_answer(self, row: Mapping[str, Any]) -> bool:
        """A completion, or a conversation that ends with the assistant."""
        return self.expected(row) is not None

    def sample(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of plain text, its first words only."""
        if "messages" in row or "prompt" in row:
            return row
        return {"text": " ".join(str(row["text"]).split()[:24])}

    def show(self, row: Mapping[str, Any], prediction: Mapping[str, Any]) -> tuple[str, str | None, str]:
        """The last question, and the answers."""
        if "prompt" in row:
            question = content_of(row["prompt"])
        elif "messages" in row:
            asked = [turn for turn in row["messages"] if turn["role"] != "assistant"]
            question = str(asked[-1]["content"]) if asked else ""
        else:
            question = str(row["text"])
        return question, self.expected(row), str(prediction["output"])

    @staticmethod
    def expected(row: Mapping[str, Any]) -> str | None:
        """The answer a row gives, if it gives one."""
        if row.get("messages"):
            last = row["messages"][-1]
            return str(last["content"]) if last["role"] == "assistant" else None
        completion = row.get("completion")
        return content_of(completion) if completion is not None else None

    def _segments(self, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        if self.template == "plain" and "messages" not in row:
            return [(content_of(row["prompt"]), False), (content_of(row["completion"]), True)]
        turns = messages_of(row)
        while turns[-1]["role"] != "assistant":
            turns.pop()  # nothing after the last answer is learned
        return chat_segments(turns, tokenizer)

    def _tokens(self, segments: Sequence[Segment], tokenizer: Any) -> tuple[list[int], list[int]]:
        """Token ids and labels. A learned segment ends with the end token, added where the template has none."""
        ids: list[int] = []
        labels: list[int] = []
        for index, (text, learned) in enumerate(segments):
            piece = tokenizer(text, add_special_tokens=index == 0 and self.template == "plain")["input_ids"]
            stop = _last_index(piece, tokenizer.eos_token_id) + 1 or len(piece)
            if learned and index == len(segments) - 1:
                piece = piece[:stop]  # without the template's line break after the last turn
                if piece[-1:] != [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None:
                    piece, stop = [*piece, tokenizer.eos_token_id], stop + 1
            ids += piece
            labels += [*piece[:stop], *[IGNORED] * (len(piece) - stop)] if learned else [IGNORED] * len(piece)
        return ids, labels

    def _encode_text(self, text: str, tokenizer: Any) -> list[dict[str, Any]]:
        ids = tokenizer(text)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        if len(ids) < 2:  # the first token is predicted from nothing
            ids = []
        starts = range(0, max(len(ids) - 1, 1), self.max_length)
        pieces = [ids[start : start + self.max_length] for start in starts]
        if len(ids) - starts[-1] > self.max_length:
            pieces.append(ids[-2:])  # the end token alone would be predicted from nothing
        told = {"given": 0, "learned": len(ids), "truncated": False}
        return [{"input_ids": piece, "labels": piece, **told} for piece in pieces]


def _is_text(row: Mapping[str, Any]) -> bool:
    return row.get("text") is not None and "messages" not in row and "prompt" not in row


def _stretches(labels: Sequence[int]) -> list[list[int]]:
    """The learned tokens, a list for each unbroken run of them."""
    return [list(run) for learned, run in itertools.groupby(labels, key=lambda label: label != IGNORED) if learned]


def _last_index(ids: Sequence[int], wanted: int | None) -> int:
    return max((index for index, token in enumerate(ids) if token == wanted), default=-1)


def parsed(text: str) -> str | None:
    """The JSON value a text is, in one canonical spelling (so that true is not 1), or None if it is none."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return None


def _left_padded(prompts: Sequence[Sequence[int]], tokenizer: Any, device: torch.device) -> dict[str, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = [[*[pad] * (longest - len(prompt)), *prompt] for prompt in prompts]
    mask = [[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _labelled(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Where the next token is to be predicted, ``[rows, tokens]``, and these tokens, ``[n]``."""
    following = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    labelled = following != IGNORED
    return labelled, following[labelled]
