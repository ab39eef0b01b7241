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
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Train an adapter from a config and key=value overrides.

    The adapter is written to OUTPUT/adapter, in a layout peft reads. A run that was cut off goes on where it was
    when the same command is given again.

    Examples:

        veneer train config.yaml

        veneer train config.yaml method.rank=8 train.epochs=1 output=runs/small

        veneer train base=minilm-l6 data.train=mails.csv output=runs/mails

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
    json
        Print the result as one JSON object on stdout.
    """
    from veneer.errors import ConfigError

    if not arguments:
        raise ConfigError(_EXPLAIN)
    from dataclasses import asdict

    from veneer.cli.output import print_json
    from veneer.training.config import read_config

    has_file = "=" not in arguments[0]
    config = read_config(Path(arguments[0]) if has_file else None, arguments[1:] if has_file else arguments)

    from veneer.training.runs import run  # heavy: only once the config is known to be right

    _, result = run(config)
    if json:
        print_json({"output": str(config.output), **asdict(result)})
