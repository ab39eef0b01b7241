"""``veneer train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

_EXPLAIN = """\
Nothing to train yet. The least a run needs is a base, data and an output folder:

  veneer train base=smollm2-135m-instruct data.train=answers.jsonl output=runs/answers

with rows like {"prompt": "...", "completion": "..."}; or a config file of the same keys:

  veneer train config.yaml train.learning_rate=1e-4

`veneer train --help` shows more."""


def train_(
    *arguments: str,
    output: Path | None = None,
    continue_: Annotated[Path | None, Parameter(name="--continue")] = None,
    reproduce: Path | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Train an adapter from a config and key=value overrides.

    The adapter is written to OUTPUT/adapter, in a layout peft reads. A run that was cut off goes on where it was
    when the same command is given again. Ctrl-C ends the step under way, saves, and exits 130.

    Examples:

        veneer train config.yaml

        veneer train config.yaml method.rank=8 train.epochs=1 output=runs/small

        veneer train base=minilm-l6 data.train=mails.csv output=runs/mails

        veneer train --continue runs/mails data.train=newer.csv output=runs/mails-2

        veneer train --reproduce runs/mails --output runs/again

    A config:

        base: smollm2-135m-instruct       # hub id, folder, .gguf file or catalogue name
        method: {name: lora, rank: 16}    # see `veneer methods`
        data:
          train: answers.jsonl            # .jsonl .json .csv .parquet .txt .md, folder, hub id
          validation: 0.1                 # a share, or a file
        train: {epochs: 3, batch_size: 8, learning_rate: 5.0e-4}
        output: runs/answers

    Parameters
    ----------
    arguments
        A YAML config (optional), then key=value overrides.
    output
        Folder of the run; the same as output=FOLDER.
    continue_
        An adapter or run to go on training, on other data; the same as continue_from=FOLDER. The report says how
        it does on its old held-out rows, before and after.
    reproduce
        A run to run again from its record. Says whether the same weights come out; exits 1 if not.
    json
        Print the result as one JSON object on stdout.
    """
    from dataclasses import asdict

    from veneer.cli.output import print_json
    from veneer.errors import ConfigError

    if reproduce is not None:
        _reproduce(arguments, reproduce, output, continue_, json)
        return
    if not arguments and continue_ is None:
        raise ConfigError(_EXPLAIN)
    from veneer.training.config import read_config

    has_file = bool(arguments) and "=" not in arguments[0]
    config = read_config(
        Path(arguments[0]) if has_file else None,
        arguments[1:] if has_file else arguments,
        output=output,
        continue_from=None if continue_ is None else str(continue_),
    )

    from veneer.training.runs import run  # heavy: only once the config is known to be right

    _, result = run(config)
    if json:
        print_json({"output": str(config.output), **asdict(result)})


def _reproduce(arguments: tuple[str, ...], source: Path, output: Path | None, other: Path | None, json: bool) -> None:
    import sys
    from dataclasses import asdict

    from veneer.cli.output import console, print_json
    from veneer.errors import ConfigError

    given = [Path(text.removeprefix("output=")) for text in arguments if text.startswith("output=")]
    if len(given) < len(arguments) or other is not None:
        raise ConfigError("--reproduce takes everything from the run's record; give nothing besides but an output.")
    if output is None and not given:
        raise ConfigError(f"Say where to: veneer train --reproduce {source} --output FOLDER.")
    from veneer.training.runs import reproduce

    target = output or given[-1]
    _, result, found = reproduce(source, target)
    if json:
        print_json({"output": str(target), **asdict(found), "result": asdict(result)})
    elif found.same:
        console.print(f"Reproduced: the weights are the same, bit for bit (sha256 {found.found}).")
    else:
        why = f" Since then: {found.versions}." if found.versions else ""
        console.print(
            f"Not reproduced: sha256 {found.found} instead of {found.recorded}.{why} "
            "Bit-equal weights need the same machine, versions and number of threads."
        )
    if not found.same:
        sys.exit(1)
