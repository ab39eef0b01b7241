"""``veneer chat``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from veneer.adapters import Base
    from veneer.evaluation.conversation import Conversation

NONE = "none"


def chat_(
    model: str,
    *,
    adapter: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    base_model: str | None = None,
    system: str | None = None,
    max_new_tokens: Annotated[int, Parameter(validator=Number(gte=1))] = 256,
    temperature: Annotated[float, Parameter(validator=Number(gte=0))] = 0.0,
    seed: int = 0,
) -> None:
    """Talk with a base and its adapters, switch between them, compare them.

    Answers appear as they are generated, on stdout; all else is said on stderr. Ctrl-C stops an answer; at the
    prompt it ends the conversation, as does the end of the input, so questions can come from a file, a line each.

    Within it: /adapter NAME has that adapter answer from now on (/adapter none: the plain base), /compare shows what
    base and adapters answer to the latest question by itself (/compare TEXT: to that), /reset forgets the conversation,
    /help and /quit.

    Examples:

        veneer chat runs/answers

        veneer chat smollm2-135m-instruct --adapter support=runs/support legal=runs/legal

        veneer chat runs/answers --temperature 0.7 < questions.txt

    Parameters
    ----------
    model
        An adapter folder, a run's folder, or a base.
    adapter
        More adapters over the same base, as NAME=FOLDER or FOLDER.
    base_model
        Where to find the base, if not where the adapter says.
    system
        Instructions put before the conversation.
    max_new_tokens
        Longest answer.
    temperature
        0 takes the likeliest token each time; above, tokens are drawn.
    seed
        Of the draw.
    """
    import torch

    from veneer.evaluation.conversation import Conversation
    from veneer.training.progress import console

    base, first = _loaded(model, adapter, base_model)
    talk = Conversation(base, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    torch.manual_seed(seed)
    console.print(
        f"[bold]{base.name}[/bold]  ·  adapters: {', '.join(base.adapters) or NONE}  ·  answering: {first or NONE}"
        "  ·  /help lists the commands"
    )
    if not talk.remembers:
        console.print("This base has no chat template: it goes on with what you write, each time anew.")
    _Session(talk, first).run()


def _loaded(model: str, more: tuple[str, ...], base_model: str | None) -> tuple[Base, str | None]:
    """The base with all adapters attached, and the name of the one to begin with."""
    from veneer.adapters.files import adapter_folder
    from veneer.errors import AdapterFileError, ConfigError
    from veneer.tasks import load_adapter, load_base
    from veneer.tasks.causal_lm import CausalLM

    try:
        adapter_folder(model)
    except AdapterFileError:
        if base_model is not None:
            raise  # then it was to be an adapter
        base, first = load_base(model, task=CausalLM.name), None
    else:
        loaded = load_adapter(model, base=base_model)
        base, first = loaded.base, loaded.name
    for given in more:
        name, equals, folder = given.partition("=")
        named = bool(equals) and not Path(given).exists()
        base.load(folder if named else given, name if named else None)
    if NONE in base.adapters:
        raise ConfigError(f"{NONE!r} is what the plain base is called here; name that adapter: --adapter NAME=FOLDER.")
    return base, first if first is not None or not base.adapters else next(iter(base.adapters))


class _Session:
    """Reads lines and does what they say."""

    def __init__(self, talk: Conversation, active: str | None) -> None:
        self.talk = talk
        self.active = active
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "adapter": ("NAME: have that adapter answer; none: the plain base", self._switch),
            "compare": ("[TEXT]: what base and adapters answer to the latest question, or to TEXT", self._compare),
            "reset": ("forget the conversation", self._reset),
            "help": ("show this", self._help),
            "quit": ("leave (so do Ctrl-D and Ctrl-C)", lambda _: None),
        }

    def run(self) -> None:
        """Until /quit, the end of the input, or Ctrl-C at the prompt."""
        from veneer.errors import VeneerError

        try:
            for line in self._lines():
                if line == "/quit":
                    return
                try:
                    self._do(line)
                except VeneerError as error:
                    _note(f"error: {error}")
        except KeyboardInterrupt:
            _note("")

    def _lines(self) -> Iterator[str]:
        """What is typed, or piped in, without empty lines."""
        if not sys.stdin.isatty():
            if hasattr(sys.stdin, "reconfigure"):
                sys.stdin.reconfigure(errors="replace")
            yield from (line.strip() for line in sys.stdin if line.strip())
            return
        import readline  # noqa: F401  (line editing and history for input())

        while True:
            try:
                line = input(f"{self.active or NONE}> ").strip()
            except EOFError:
                _note("")
                return
            if line:
                yield line

    def _do(self, line: str) -> None:
        from veneer.errors import UnknownName, did_you_mean

        if not line.startswith("/"):
            self._ask(line)
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            hint = did_you_mean(f"/{name}", [f"/{command}" for command in self.commands])
            raise UnknownName(f"There is no /{name}.{hint} /help lists what there is.")
        self.commands[name][1](rest.strip())

    def _ask(self, question: str) -> None:
        def say(text: str) -> None:
            print(text, end="", flush=True)

        reply = self.talk.ask(self.active, question, say)
        print()
        if reply.ending == "cut":
            _note("(cut short; --max-new-tokens allows longer answers)")
        elif reply.ending == "stopped":
            _note("(stopped)")
        if reply.left_out:
            _note(f"(the oldest {reply.left_out} turns no longer fit into the base's context and were left out)")

    def _switch(self, name: str) -> None:
        known = self.talk.base.adapters
        if name and name != NONE:
            self.active = self.talk.base[name].name
        elif name:
            self.active = None
        _note(f"answering: {self.active or NONE}  ·  adapters: {', '.join(known) or NONE}")

    def _compare(self, text: str) -> None:
        from veneer.cli.output import console, table

        replies = self.talk.compare(text or None)
        columns = ["plain base" if name is None else name for name in replies]
        console.print(table(columns, [[reply.text.replace("[", r"\[") for reply in replies.values()]]))

    def _reset(self, _: str) -> None:
        self.talk.reset()
        _note("forgotten")

    def _help(self, _: str) -> None:
        for name, (what, _do) in self.commands.items():
            _note(f"/{name:8} {what}")


def _note(text: str) -> None:
    from veneer.training.progress import console

    console.print(text, markup=False)
