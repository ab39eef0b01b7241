"""``veneer plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from veneer.cli.columns import POSITIVE

if TYPE_CHECKING:
    from veneer.planning import MethodPlan, Plan
    from veneer.planning.advice import Advice

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
    serve: Literal["one", "many", "merged"] = "one",
    watts: float | None = None,
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
    serve
        How what comes out is to be served: one adapter at a time, many in one batch, or a merged model.
    watts
        What the machine draws when busy, for the energy of a run; of GPUs their limit is taken.
    json
        Print the plan as one JSON object on stdout.
    """
    from veneer.errors import ConfigError

    if not arguments and base is None:
        raise ConfigError(_EXPLAIN)
    named = [each.removeprefix("base=") for each in arguments if each.startswith("base=")]
    if len({*named, *([base] if base is not None else [])}) > 1:
        told = " ".join([*(f"base={each}" for each in named), *([f"--base {base}"] if base is not None else [])])
        raise ConfigError(f"{told}: more than one base; a plan is of one.")
    from veneer.cli.output import print_json
    from veneer.cli.steps import steps
    from veneer.planning import plan
    from veneer.planning.advice import advise
    from veneer.planning.request import from_config

    request = from_config(
        arguments, base=base, methods=methods, device=device, memory=memory, length=length, labelled=labelled,
        variants=variants, watts=watts,
    )  # fmt: skip
    with steps("methods") as begin:
        found = plan(request, begin)
    advice = advise(found, rows=request.data.rows if request.data else None, serving=serve)
    if json:
        print_json(plain(found, advice))
    else:
        show(found, advice)


def plain(found: Plan, advice: Advice) -> dict[str, Any]:
    """A plan as plain values for JSON."""
    from dataclasses import asdict

    request = found.request
    return {
        "base": found.base,
        "batch": asdict(request.batch) | {"passes": request.passes, "checkpointing": request.checkpointing},
        "machine": {
            "name": found.machine.name,
            "memory": found.memory,
            "measured": found.machine.measured,
            "watts": request.watts or found.machine.watts,
        },
        "data": asdict(request.data) if request.data is not None else None,
        "variants": request.variants,
        "methods": [asdict(row) for row in found.methods],
        "left_out": found.left_out,
        "notes": list(found.notes),
        "recommendation": asdict(advice),
    }


def show(found: Plan, advice: Advice) -> None:
    """A header, the table, the recommendation with its rules."""
    from veneer.cli.output import console, table
    from veneer.training.progress import size

    request, base, batch = found.request, found.base, found.request.batch
    passes = f"{request.passes} passes of " if request.passes > 1 else ""
    if request.data is not None:
        passes = f"steps of {request.rows_of_a_step} rows, the largest pass "
    told = f"{passes}{batch.rows} × {batch.tokens} tokens" + (", checkpointed" if request.checkpointing else "")
    console.print(
        f"[bold]{base['name']}[/bold]  {base['parameters']:,} parameters, {base['dtype']}: "
        f"{size(base['weight_bytes'][base['dtype']])}  ·  {told}  ·  {found.machine.name}, {size(found.memory)}"
    )
    if request.data is not None:
        data = request.data
        how = "" if data.counted else " (estimated from characters: this base's tokenizer is not here)"
        console.print(f"{data.rows:,} rows, {data.mean:.0f} tokens on average, {data.longest:,} at most{how}")
    heads = ["method", "trained ", "share ", "file ", "train ", "fits", "rows ", "step ", "serve "]
    heads += [f"{request.variants} variants ", *(["run "] if request.data is not None else [])]
    console.print(table(heads, [_cells(row) for row in found.methods]))
    for name, why in found.left_out.items():
        console.print(f"left out: {name}: {why.splitlines()[0]}", markup=False, style="dim")
    besides = "; besides that, Python and its libraries hold some 0.6 GB" if found.machine.heap else ""
    notes = [*found.notes, f"train, serve: peak memory of tensors{besides}", "rows: the largest pass that fits, about"]
    if request.data is not None:
        notes += ["step: of the optimiser, its rows of average length; run: all steps, validations apart"]
    if any(row.copies for row in found.methods):
        notes += ["file of a full fine-tuning: float32; its variants: copies in the base's dtype"]
    how = "at this machine's rates, measured just now" if found.machine.measured else "by public figures, not measured"
    notes += [f"times {how}"]
    notes += ["quantised weights counted analytically"] if request.quantize else []
    console.print("\n".join(notes), style="dim")
    show_advice(advice)


def show_advice(advice: Advice) -> None:
    """The recommendation, and the rules that led to it."""
    from veneer.cli.output import console

    console.print(f"\nrecommended  [bold]{advice.method or 'nothing here'}[/bold]")
    for reason in advice.reasons:
        some = ", ".join(reason.rows[:6]) + (f" and {len(reason.rows) - 6} more" if len(reason.rows) > 6 else "")
        console.print(f"  {reason.rule:<9} {reason.text}: {some or 'none'}", markup=False)
    if advice.instead is not None:
        console.print(f"  {advice.instead}", markup=False)


def _cells(row: MethodPlan) -> tuple[str, ...]:
    from veneer.training.progress import duration, size

    cells = (
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
    return cells if row.run is None else (*cells, duration(row.run.seconds))
