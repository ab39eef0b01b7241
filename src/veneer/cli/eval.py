"""``veneer eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from veneer.cli.columns import POSITIVE

if TYPE_CHECKING:
    from veneer.evaluation import Forgetting, Report, Score


def eval_(
    adapter: Path,
    data: str,
    *,
    split: str = "test",
    limit: Annotated[int | None, Parameter(validator=POSITIVE)] = None,
    batch_size: Annotated[int, Parameter(validator=POSITIVE)] = 16,
    max_new_tokens: Annotated[int | None, Parameter(validator=POSITIVE)] = None,
    base: bool = True,
    base_model: str | None = None,
    columns: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    forgetting: bool = True,
    retention: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = (),
    lm_eval: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    lm_eval_folder: Path | None = None,
    record: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Evaluate an adapter on held-out data, the plain base beside it.

    Reports loss and the task's metrics (perplexity, exact match, JSON match, accuracy), with 95 % intervals where
    a metric is a mean over rows. And what the adapter has forgotten of what the base knew, on general texts, prompts
    and questions that come with veneer (for classifiers: what is left of the base's features).

    Examples:

        veneer eval runs/answers held_out.jsonl

        veneer eval runs/answers held_out.jsonl --limit 200 --json

        veneer eval runs/answers held_out.jsonl --retention manuals.jsonl --record

        veneer eval runs/answers held_out.jsonl --lm-eval capitals --lm-eval-folder tasks

    Parameters
    ----------
    adapter
        An adapter folder, or a run's folder.
    data
        A file, folder, hub id or catalogue name, of the kind the adapter was trained on.
    split
        Split of a hub or catalogue data set.
    limit
        Evaluate a random choice of this many rows.
    batch_size
        Rows a batch.
    max_new_tokens
        Longest answer; by default half again as long as the longest learned from.
    base
        Evaluate the plain base, too.
    base_model
        Where to find the base, if not where the adapter says.
    columns
        Columns under other names, e.g. prompt=question; those of the training are known.
    forgetting
        Measure what was forgotten, too.
    retention
        Files of your own to measure it on besides: with text, or prompt and completion.
    lm_eval
        Run these tasks of lm-evaluation-harness, too, through the adapter and the plain base; at most as many rows
        of each as --limit says. Needs it installed: pip install 'veneer[lm-eval]'.
    lm_eval_folder
        Folder with task files of your own for it.
    record
        Keep what was found in the adapter's folder: in its record, and in its model card.
    json
        Print one JSON object on stdout.
    """
    from dataclasses import asdict

    from veneer.cli.columns import mapping
    from veneer.cli.output import console, print_json, table
    from veneer.errors import ConfigError
    from veneer.evaluation import evaluate
    from veneer.evaluation.harness import harness
    from veneer.evaluation.record import keep
    from veneer.evaluation.retention import own
    from veneer.tasks import load_adapter
    from veneer.training.progress import console as progress

    if retention and not forgetting:
        raise ConfigError("--retention says what to measure forgetting on; leave out --no-forgetting, or it.")
    own(retention)
    longest: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    loaded = load_adapter(adapter, base=base_model)
    report = evaluate(
        loaded,
        data,
        split=split,
        limit=limit,
        batch_size=batch_size,
        base=base,
        columns=mapping(columns),
        forgetting=forgetting,
        retention=retention,
        **longest,
        progress=lambda text: progress.print(f"[dim]evaluating {text}[/dim]"),
    )
    ran = harness(loaded, lm_eval, folder=lm_eval_folder, limit=limit) if lm_eval else []
    if record:
        keep(loaded, adapter, {"data": Path(data).name, **report.plain(), "lm_eval": [asdict(each) for each in ran]})
    if json:
        told = {"adapter_folder": str(adapter), "data": data, **report.plain()}
        print_json(told | ({"lm_eval": [asdict(each) for each in ran]} if ran else {}))
        return
    _tell(report, data)
    if report.forgetting:
        _tell_forgotten(report.forgetting)
    if ran:
        rows = [(f"{each.task}, {each.metric}", _shown(each.base), _shown(each.adapter)) for each in ran]
        console.print(table(("", "plain base", "adapter"), rows, title="\nlm-evaluation-harness"))


def _tell(report: Report, data: str) -> None:
    from veneer.cli.output import console, table

    other = report.base or {}
    rows = [(name, _shown(score), _shown(other.get(name))) for name, score in report.adapter.items()]
    title = f"{report.rows} rows of {data}, 95 % intervals"
    console.print(table(("", "adapter", report.compared_with or ""), rows, title=title))
    if report.truncated or report.dropped:
        console.print(f"{report.truncated} rows were cut at the adapter's task.max_length, {report.dropped} left out.")
    if report.unfinished:
        console.print(f"{report.unfinished} answers were cut short; --max-new-tokens allows longer ones.")
    for name, scores in report.by_task.items():
        console.print(table(("", "adapter"), [(m, _shown(s)) for m, s in scores.items()], title=f"task {name}"))


def _shown(score: Score | None) -> str:
    if score is None:
        return ""
    interval = f"  [{score.low:.3f}, {score.high:.3f}]" if score.low is not None else ""
    return f"{score.value:.4g}{interval}"


def _tell_forgotten(found: Forgetting) -> None:
    from veneer.cli.output import console, table

    if found.undefined:
        console.print(f"What was forgotten is not defined here: {found.undefined}.")
        return
    rows = [
        (
            f"{change.measure} on {change.rows} {change.data}",
            f"{change.base:.4g}",
            f"{change.adapter:.4g}",
            f"{change.change.value:+.3f}  [{change.change.low:+.3f}, {change.change.high:+.3f}]",
        )
        for change in found.changes
    ]
    console.print(table(("", "plain base", "adapter", "change"), rows, title="\nwhat was forgotten"))
