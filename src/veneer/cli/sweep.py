"""``veneer sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from veneer.cli.columns import POSITIVE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from veneer.training.sweep import Sweep, Trial

_EXPLAIN = """\
Nothing to search yet. Say what is to be trained, as for `veneer train`, and which keys are to take which values:

  veneer sweep config.yaml train.learning_rate=log:1e-5:1e-2 method.rank=4,8,16 output=runs/search

`veneer sweep --help` shows more."""


def sweep_(
    *arguments: str,
    trials: Annotated[int, Parameter(validator=POSITIVE)] = 20,
    metric: str = "loss",
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Search config keys for the lowest validation loss.

    Each trial is a run of its own, in a folder of its own inside OUTPUT. A search that was cut off goes on where it
    was when the same command is given again; with more --trials, a finished one goes on, too. A trial that fails is
    shown with its reason and doesn't end the search. The best config is written to OUTPUT/best.yaml, ready for
    `veneer train`; its adapter lies in its trial's folder. Needs optuna: pip install 'veneer[sweep]'.

    Values of a key to be searched:

        method.rank=4,8,16                        one of these
        train.learning_rate=log:1e-5:1e-2         between these, evenly over the orders of magnitude
        train.warmup=lin:0:0.2                    between these, evenly; whole numbers if both are whole

    Where all keys have listed values, and there are trials enough, each combination is tried once.

    Examples:

        veneer sweep config.yaml train.learning_rate=log:1e-5:1e-2 method.rank=4,8,16 output=runs/search

        veneer sweep base=minilm-l6 data.train=mails.csv output=runs/search method=lora,ia3 --metric accuracy

    Parameters
    ----------
    arguments
        A YAML config (optional), then key=value overrides and key=SPACE.
    trials
        How many runs in all.
    metric
        Of the validation: loss, perplexity (the lowest is best), accuracy, token_accuracy (the highest is best).
    json
        Print the result as one JSON object on stdout.
    """
    from veneer.errors import ConfigError

    if not arguments:
        raise ConfigError(_EXPLAIN)
    from veneer.training.sweep import BEST, Sweep

    has_file = "=" not in arguments[0]
    sweep = Sweep(Path(arguments[0]) if has_file else None, arguments[1:] if has_file else arguments, metric=metric)

    from veneer.cli.output import print_json
    from veneer.training.progress import console as progress

    done = sweep.run(trials, lambda text: progress.print(f"[bold]{text}[/bold]"))
    best = sweep.best(done)
    if json:
        print_json(
            {
                "output": str(sweep.output),
                "metric": metric,
                "best": str(best.folder) if best else None,
                "best_config": str(sweep.output / BEST) if best else None,
                "trials": [{**vars(trial), "folder": str(trial.folder)} for trial in done],
            }
        )
    else:
        _show(sweep, done, best)
    if best is None:
        raise ConfigError("All trials failed; see the reasons above.")


def _show(sweep: Sweep, done: Sequence[Trial], best: Trial | None) -> None:
    from veneer.cli.output import console, table
    from veneer.training.progress import program
    from veneer.training.sweep import BEST

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = [
        (
            "★" if trial is best else "",
            trial.folder.name,
            *(cell(trial.values.get(key, "")) for key in sweep.space),
            cell(trial.value) if trial.value is not None else "",
            (trial.error or "").splitlines()[0][:90] if trial.error else "",
        )
        for trial in done
    ]
    order = "lowest" if sweep.lowest_is_best else "highest"
    console.print(table(("", "trial", *sweep.space, f"{sweep.metric} ", "failed because"), rows))
    if best is not None:
        console.print(f"\n{order} {sweep.metric}: {cell(best.value)}, adapter in {best.folder / 'adapter'}")
        console.print(f"again or longer: {program()} train {sweep.output / BEST}", markup=False, soft_wrap=True)
