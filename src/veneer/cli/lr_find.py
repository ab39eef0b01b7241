"""``veneer lr-find``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from veneer.cli.columns import POSITIVE

if TYPE_CHECKING:
    from veneer.training.lr_find import Curve

_EXPLAIN = """\
Nothing to test yet. Say what is to be trained, as for `veneer train`:

  veneer lr-find base=smollm2-135m-instruct data.train=answers.jsonl

`veneer lr-find --help` shows more."""


def lr_find_(
    *arguments: str,
    steps: Annotated[int, Parameter(validator=POSITIVE)] = 100,
    low: float | None = None,
    high: float | None = None,
    plot: Path | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Find a learning rate by raising it until the loss explodes.

    Trains a fresh adapter for about a hundred small steps, each at a higher learning rate than the one before, and
    suggests the rate at which the loss falls fastest, but at most a tenth of the rate at which it explodes. The
    method's own default stands beside it. Nothing is kept: base, data and output folder stay as they are.

    Examples:

        veneer lr-find config.yaml

        veneer lr-find base=smollm2-135m-instruct data.train=answers.jsonl method=ia3 --plot curve.svg

    Parameters
    ----------
    arguments
        A YAML config (optional), then key=value overrides, as for `veneer train`.
    steps
        Optimiser steps at most.
    low
        Learning rate of the first step; by default a thousandth of the method's own.
    high
        Learning rate of the last step; by default a thousand times the method's own.
    plot
        Draw the curve into this .svg file, too.
    json
        Print the curve as one JSON object on stdout.
    """
    from veneer.errors import ConfigError

    if not arguments:
        raise ConfigError(_EXPLAIN)
    if plot is not None and plot.suffix != ".svg":
        raise ConfigError(f"--plot {plot}: the curve is drawn as SVG; give a file that ends in .svg.")
    from veneer.training.config import read_config

    has_file = "=" not in arguments[0]
    overrides = arguments[1:] if has_file else arguments
    config = read_config(Path(arguments[0]) if has_file else None, overrides, defaults={"output": "."})

    from veneer.cli.output import print_json
    from veneer.training.lr_find import find_learning_rate
    from veneer.training.progress import console as progress
    from veneer.training.runs import set_up

    adapter, task, parts = set_up(config)
    progress.print(f"[dim]{config.method.name} on {config.base}: up to {steps} steps, each at a higher rate[/dim]")
    curve = find_learning_rate(adapter, task, parts[0].rows, config.train, steps=steps, low=low, high=high)
    if plot is not None:
        _draw(curve, plot, f"{config.method.name} on {config.base}, batches of {config.train.batch_size}")
    if json:
        print_json({"base": config.base, "method": config.method.name, **plain(curve)})
    else:
        _show(curve, config.method.name, plot)


def plain(curve: Curve) -> dict[str, Any]:
    """A curve as plain values for JSON."""
    points = zip(curve.rates, curve.losses, curve.smoothed, strict=True)
    return {
        "suggestion": curve.suggestion,
        "method_default": curve.prior,
        "steepest": curve.steepest,
        "diverged_at": curve.diverged_at,
        "points": [{"learning_rate": rate, "loss": loss, "smoothed": smooth} for rate, loss, smooth in points],
    }


def _marks(curve: Curve) -> dict[str, float]:
    marks = {"default": curve.prior, "exploded": curve.diverged_at, "suggested": curve.suggestion}
    inside = {name: rate for name, rate in marks.items() if rate is not None}
    return {name: rate for name, rate in inside.items() if curve.rates[0] <= rate <= curve.rates[-1]}


def _draw(curve: Curve, path: Path, title: str) -> None:
    from veneer.cli.plot import svg_plot
    from veneer.storage import write_text

    write_text(path, svg_plot(curve.rates, curve.losses, curve.smoothed, _marks(curve), title=title))


def _show(curve: Curve, method: str, plot: Path | None) -> None:
    from veneer.cli.output import console
    from veneer.cli.plot import text_plot

    console.print(text_plot(curve.rates, curve.smoothed, _marks(curve)), markup=False)
    console.print("loss, smoothed, over the learning rate; d: the method's default, s: suggested, e: exploded\n")
    found = "none: the loss did not fall beyond its noise; take the default, or larger batches, or more steps"
    if curve.suggestion is not None:
        found = f"train.learning_rate={curve.suggestion:g}"
    console.print(f"suggested  {found}")
    console.print(f"default    {curve.prior:g}, what {method} starts with")
    if curve.steepest is not None:
        console.print(f"steepest   {curve.steepest:.1e}, where the loss falls fastest")
    exploded = f"{curve.diverged_at:.1e}" if curve.diverged_at is not None else f"not up to {curve.rates[-1]:.1e}"
    console.print(f"exploded   {exploded}")
    if plot is not None:
        console.print(f"drawn      {plot}")
