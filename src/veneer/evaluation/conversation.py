"""A conversation with a base and its adapters: history, answers as they are generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from veneer.adapters import Base
from veneer.errors import ConfigError, DataError
from veneer.tasks import adapter_task
from veneer.tasks.causal_lm import CausalLM


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: as far as it got.
        ending: ``finished``, ``cut`` at the most tokens allowed, or ``stopped`` by Ctrl-C.
        left_out: the oldest turns that no longer fit into the base's context.
    """

    text: str
    ending: str
    left_out: int


class Conversation:
    """Turns so far, and who may answer the next one. Greedy, unless a temperature is given.

    Args:
        base: with any number of adapters attached.
        system: instructions that stand before everything, or None.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.

    Raises:
        ConfigError: the base has no tokenizer, or an adapter is for a task that generates no text.
    """

    def __init__(
        self, base: Base, *, system: str | None = None, max_new_tokens: int = 256, temperature: float = 0.0
    ) -> None:
        if base.tokenizer is None:
            raise ConfigError(f"{base.name} has no tokenizer; put the base's tokenizer files into its folder.")
        self.base = base
        self.max_new_tokens = max_new_tokens
        self._drawing = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []
        self._tasks: dict[str | None, CausalLM] = {None: CausalLM.for_rows(None, base)}
        for name, adapter in base.adapters.items():
            task = adapter_task(adapter)
            if not isinstance(task, CausalLM):
                raise ConfigError(
                    f"Adapter {name!r} is for {task.name}, which generates no text; use `veneer predict`."
                )
            self._tasks[name] = task

    @property
    def remembers(self) -> bool:
        """Whether the plain base has a chat template; without one every question stands alone."""
        return self._tasks[None].template == "chat"

    @property
    def last_question(self) -> str | None:
        """The latest question."""
        asked = [turn["content"] for turn in self.turns if turn["role"] == "user"]
        return asked[-1] if asked else None

    def ask(self, name: str | None, question: str, say: Callable[[str], None]) -> Reply:
        """Have an adapter (None: the plain base) answer, and remember both.

        Args:
            name: of the adapter.
            question: the next turn.
            say: given the answer piece by piece. Ctrl-C ends it; what was said until then is remembered.

        Raises:
            DataError: the question is longer than the base's context.
        """
        reply = self._answer(name, [*self.turns, {"role": "user", "content": question}], say)
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply.text}]
        return reply

    def compare(self, question: str | None = None) -> dict[str | None, Reply]:
        """What the plain base and every adapter answer to ``question``, or to the latest one, asked by itself.

        What was said before is left out: one side's answers would teach the other. Nothing of it is remembered.

        Raises:
            ConfigError: there is no question yet.
            DataError: the question is longer than the base's context.
        """
        question = question or self.last_question
        if question is None:
            raise ConfigError("There is no question to compare answers to yet; ask one, or give it: /compare TEXT.")
        turns = [{"role": "user", "content": question}]
        return {name: self._answer(name, turns, lambda _: None) for name in (None, *self.base.adapters)}

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []

    def _answer(self, name: str | None, turns: list[dict[str, str]], say: Callable[[str], None]) -> Reply:
        model = self.base.model if name is None else self.base[name]
        ids, left_out = self._fit(self._tasks[name], turns)
        context = self._context()
        room = self.max_new_tokens if context is None else min(self.max_new_tokens, context - len(ids))
        streamer = _Streamer(self.base.tokenizer, say)
        given = torch.tensor([ids], device=self.base.device)
        try:
            with torch.no_grad():
                out = model.generate(  # type: ignore[operator]
                    input_ids=given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=room,
                    streamer=streamer,
                    **self._drawing,
                )
        except KeyboardInterrupt:
            return Reply(streamer.said.strip(), "stopped", left_out)
        length = out.shape[-1] - len(ids)
        return Reply(
            streamer.said.strip(), "cut" if length >= room and not self._ends(out[0]) else "finished", left_out
        )

    def _fit(self, task: CausalLM, turns: list[dict[str, str]]) -> tuple[list[int], int]:
        """The tokens to go on from, without the oldest turns if need be."""
        context, left_out = self._context(), 0
        turns = turns if task.template == "chat" else turns[-1:]
        while True:
            ids = task.prompt_tokens(self._row(task, turns[left_out:]), self.base.tokenizer)
            if context is None or len(ids) + self.max_new_tokens <= context or len(turns) - left_out <= 1:
                break
            left_out += 2
        if context is not None and len(ids) >= context:
            raise DataError(
                f"That is {len(ids):,} tokens; {self.base.name} reads at most {context:,}, answer included."
            )
        return ids, left_out

    def _row(self, task: CausalLM, turns: list[dict[str, str]]) -> Mapping[str, Any]:
        if task.template == "chat":
            return {"messages": [*self._system, *turns]}
        return {"prompt": "\n\n".join(turn["content"] for turn in [*self._system, *turns])}

    def _context(self) -> int | None:
        return getattr(self.base.model.config, "max_position_embeddings", None)

    def _ends(self, ids: torch.Tensor) -> bool:
        end = self.base.model.generation_config.eos_token_id  # type: ignore[union-attr]
        return int(ids[-1]) in (end if isinstance(end, list) else [end])


class _Streamer(transformers.TextStreamer):
    """Hands on text as soon as it is sure to stay as it is."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say
        self.said = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of the answer, without blanks before the first."""
        text = text if self.said else text.lstrip()
        self.said += text
        self._say(text)
