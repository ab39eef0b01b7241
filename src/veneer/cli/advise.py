"""``veneer advise``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import Parameter

from veneer.cli.columns import POSITIVE

_EXPLAIN = """\
Nothing to advise on yet. Say what there is: data, a base, or a machine:

  veneer advise data.train=answers.jsonl
  veneer advise base=llama-3-8b data.train=answers.jsonl --memory 24GB
  veneer advise --device rtx-4090

`veneer advise --help` shows more."""


def advise_(
    *arguments: str,
    device: str | None = None,
    memory: str | None = None,
    length: Annotated[int | None, Parameter(validator=POSITIVE)] = None,
    serve: Literal["one", "many", "merged"] = "one",
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Say which base, of which size, and which method suit this data and this machine, and why.

    Without a base, the largest well-known ones are looked for whose training fits: as they are, with checkpointing,
    and quantised besides. With one, or on the catalogued base that suits the task best, all methods are planned and
    one is recommended; the rules that were used are named, with the rows each of them left in.

    Examples:

        veneer advise data.train=answers.jsonl

        veneer advise base=minilm-l6 data.train=mails.csv --serve many

        veneer advise --device rtx-4090 --length 1024

    Parameters
    ----------
    arguments
        A YAML config (optional), then key=value overrides, as for `veneer train`.
    device
        Advise for another machine, by public figures: rtx-4090, a100-80gb, h100 and others.
    memory
        Memory there is, such as 24GB; by default all the device has free.
    length
        Tokens a row; by default the data's longest, or 512.
    serve
        How what comes out is to be served: one adapter at a time, many in one batch, or a merged model.
    json
        Print the advice as one JSON object on stdout.
    """
    from veneer.errors import ConfigError

    if not arguments and device is None and memory is None:
        raise ConfigError(_EXPLAIN)
    from dataclasses import asdict, replace

    from veneer.cli.output import console, print_json, table
    from veneer.cli.plan import plain, show
    from veneer.cli.steps import steps
    from veneer.planning import plan
    from veneer.planning.advice import advise
    from veneer.planning.bases import Candidate, largest
    from veneer.planning.request import SUITED, from_config
    from veneer.training.progress import size

    request = from_config(arguments, device=device, memory=memory, length=length, default_base=SUITED)
    kinds = request.task.kinds if request.task is not None else ("decoder",)
    candidates: list[Candidate] = []
    if request.base == SUITED:
        with steps("bases") as begin:
            candidates = largest(request, kinds, begin)
        request = replace(request, base=_catalogued(kinds))
    with steps(f"methods on {request.base}") as begin:
        found = plan(request, begin)
    advice = advise(found, rows=request.data.rows if request.data else None, serving=serve)
    if json:
        told: dict[str, Any] = {"bases": [asdict(each) for each in candidates], **plain(found, advice)}
        print_json(told)
        return
    if candidates:
        rows = [
            (each.base, f"{each.parameters / 1e9:.3g} B", "yes" if each.checkpointing else "", each.quantize or "",
             size(each.row.train_memory["total"]), "yes" if each.catalogued else "from a hub or a folder")
            for each in candidates
        ]  # fmt: skip
        console.print(table(("largest base that fits", "size ", "checkpointing", "quantize", "train ", "here"), rows))
        console.print(f"\nmethods, on the catalogued {request.base}:")
    show(found, advice)


def _catalogued(kinds: tuple[str, ...]) -> str:
    """The catalogued base that suits a task best."""
    from veneer.bases.catalogue import CATALOGUE

    fitting = [entry for entry in CATALOGUE.values() if entry.kind in kinds]
    return min(fitting, key=lambda entry: kinds.index(entry.kind)).name
