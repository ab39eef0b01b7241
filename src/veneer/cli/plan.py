"""``veneer plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from veneer.cli.columns import POSITIVE

if TYPE_CHECKING:
    from veneer.planning import Plan

_EXPLAIN = """\
Nothing to plan yet. Say which base, and if you like which method, data and machine:

  veneer plan --base llama-2-7b
  veneer plan config.yaml --memory 24GB

`veneer plan --help` shows more."""


def plan_(
    *arguments: str,
    base: str | None = None,
    methods: str | None = None,
    device: str | None = None,
    memory: str | None = None,
    length: Annotated[int | None, Parameter(validator=POSITIVE)] = None,
    labelled: float = 1.0,
    variants: Annotated[int, Parameter(validator=POSITIVE)] = 100,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Show what a training takes in memory, time and storage, before anything is loaded.

    From a config as for `veneer train`, or just a base: a hub id, a folder, a catalogue name, or a well-known
    architecture such as llama-2-7b, mixtral-8x7b or llama-3.1-405b, of which nothing need be here. Without a method,
    all of them, each with its own settings, full fine-tuning among them.

    Examples:

        veneer plan --base llama-2-7b --memory 24GB

        veneer plan config.yaml train.batch_size=4 train.checkpointing=true

        veneer plan base=llama-3-70b quantize=nf4 method.rank=64 --device a100-80gb --json

    Parameters
    ----------
    arguments
        A YAML config (optional), then key=value overrides, as for `veneer train`.
    base
        The same as base=NAME.
    methods
        Which methods, separated by commas; by default the config's, or all.
    device
        Plan for another machine, by public figures: rtx-4090, a100-80gb, h100 and others.
    memory
        Memory there is, such as 24GB; by default all the device has free.
    length
        Tokens a row; by default 512, or fewer where task.max_length says so.
    labelled
        Share of the tokens that are learned.
    variants
        How many fine-tuned variants are to be kept.
    json
        Print the plan as one JSON object on stdout.
    """
    from veneer.errors import ConfigError

    if not arguments and base is None:
        raise ConfigError(_EXPLAIN)
    from veneer.cli.output import print_json
    from veneer.planning import plan
    from veneer.planning.request import from_config

    request = from_config(
        arguments, base=base, methods=methods, device=device, memory=memory, length=length, labelled=labelled,
        variants=variants,
    )  # fmt: skip
    found = plan(request)
    if json:
        print_json(plain(found))
    else:
        _show(found)


def plain(found: Plan) -> dict[str, Any]:
    """A plan as plain values for JSON."""
    from dataclasses import asdict

    request = found.request
    return {
        "base": found.base,
        "batch": asdict(request.batch) | {"accumulation": request.accumulation, "checkpointing": request.checkpointing},
        "machine": {
            "name": found.machine.name,
            "memory": found.memory,
            "measured": found.machine.measured,
        },
        "variants": request.variants,
        "methods": [asdict(row) for row in found.methods],
        "left_out": found.left_out,
    }


def _show(found: Plan) -> None:
    from veneer.cli.output import console, table
    from veneer.training.progress import size

    request, base = found.request, found.base
    batch = request.batch
    console.print(
        f"[bold]{base['name']}[/bold]  {base['parameters']:,} parameters, {base['dtype']}: "
        f"{size(base['weight_bytes'][base['dtype']])}  ·  {batch.rows} × {batch.tokens} tokens  ·  {found.machine.name}, "
        f"{size(found.memory)}"
    )
    rows = [
        (
            row.method,
            f"{row.trainable:,}",
            f"{row.trainable_share:.2%}",
            size(row.stored_bytes),
            size(row.train_memory["total"]),
            "yes" if row.fits else "no",
            str(row.largest_batch),
            f"{row.seconds_per_step:.3g} s",
            size(row.serve_memory["total"]),
            size(row.variants_bytes),
        )
        for row in found.methods
    ]
    heads = ("method", "trained ", "share ", "file ", "train ", "fits", "rows ", "step ", "serve ", f"{request.variants} variants ")
    console.print(table(heads, rows))
    for name, why in found.left_out.items():
        console.print(f"[dim]{name}: {why}[/dim]", highlight=False)
