"""The command ``veneer``: finds the subcommand and turns errors into one message and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from typing import NoReturn

from cyclopts import App, CycloptsError

import veneer
from veneer.errors import VeneerError, VeneerWarning

COMMANDS = {
    "demo": "Train a real model on a real task, in minutes, and prove what it learned.",
    "train": "Train an adapter from a config and key=value overrides.",
    "data": "Check a data file before it is learned from, or part it into train, validation, test.",
    "eval": "Evaluate an adapter on held-out data, the plain base beside it.",
    "predict": "Answer every row of a file.",
    "generate": "Answer one prompt, with or without an adapter.",
    "chat": "Talk with a base and its adapters, switch between them, compare them.",
    "merge": "Fold an adapter into its base and write the whole model.",
    "export": "Write an adapter as another method's, for those who read only that.",
    "factorize": "Write a smaller base: each linear map as two thin ones.",
    "lr-find": "Find a learning rate by raising it until the loss explodes.",
    "sweep": "Search config keys for the lowest validation loss.",
    "plan": "Show what a training takes in memory, time and storage, before anything is loaded.",
    "advise": "Say which base, size and method suit this data and this machine, and why.",
    "compare": "Compare methods on the same data, with full fine-tuning and the plain base beside them.",
    "doctor": "Check this machine, and train a tiny model on it.",
    "adapters": "Check that an adapter folder is intact.",
    "methods": "List the PEFT methods, or show all about one.",
    "sites": "Show where a method can act in a base, and the words for it.",
    "models": "List the catalogued bases, fetch one, or have one suggested.",
}
_usual_warning = warnings.formatwarning
FIRST_STEPS = (
    "First steps: `veneer demo` trains a real model in minutes; `veneer train --help` shows how to train "
    "on your own file. Every command explains itself with --help."
)


def build(chosen: str | None) -> App:
    """The app. All commands but the chosen one have just a line of help, so that none of them is imported."""
    app = App(
        name="veneer",
        version=veneer.__version__,
        help="Parameter-efficient fine-tuning: thin trainable layers over one frozen model.",
        help_epilogue=None if chosen in COMMANDS else FIRST_STEPS,
        help_format="markdown" if chosen not in COMMANDS else "plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # main() tells what the run that was stopped has to say
    )
    for name, summary in COMMANDS.items():
        module = name.replace("-", "_")
        app.command(f"veneer.cli.{module}:{module}_", name=name, **({} if name == chosen else {"help": summary}))
    return app


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings in one line, others as Python has them."""
    if issubclass(category, VeneerWarning):
        return f"warning: {message}\n"
    return _usual_warning(message, category, filename, lineno, line)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; exits 0, or 2 after a user's mistake, or 130 when interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.formatwarning = _warning
    given = sys.argv[1:] if arguments is None else arguments
    try:
        build(given[0] if given else None)(given, exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except VeneerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)


if __name__ == "__main__":
    main()
