"""What a run tells at its beginning and at its end."""

from __future__ import annotations

from pathlib import Path

from veneer.adapters import Adapter
from veneer.tasks import Task
from veneer.training.fit import Result
from veneer.training.folder import ADAPTER
from veneer.training.progress import console, duration, program, size

FORGOTTEN = 0.1
"""A rise of the loss on what was learned before, as a share of it, that is worth a warning."""


def header(adapter: Adapter, task: Task) -> None:
    """Print what is going to be trained, over what."""
    base = adapter.base
    kept = f"{base.dtype}, {base.quantized}" if base.quantized else str(base.dtype)
    about = "about " if adapter.unsurveyed else ""  # a look at the data decides
    console.print(
        f"[bold]{base.name}[/bold]  {base.parameter_count:,} parameters, {kept}, {base.device}  ·  {task.name}"
        f"  ·  [bold]{adapter.method.name}[/bold]  trains {about}{adapter.trainable:,} ({adapter.trainable_share:.2%})"
    )


def summary(adapter: Adapter, result: Result, output: Path) -> None:
    """Print what was trained, learned, forgotten and saved, and what to do next."""
    lines = [
        f"trained    {result.steps} steps, {result.tokens:,} tokens in {duration(result.seconds)}, at most "
        f"{size(result.peak_memory)} of memory; {result.padding:.0%} of what was computed was padding"
    ]
    if result.before and result.after:
        lines.append(f"learned    {_changes(result.before, result.after)}  (validation, at step {result.best_step})")
        if result.after["loss"] >= result.before["loss"]:
            lines.append("warning    the validation loss did not fall: try another train.learning_rate, or more rows")
    for old in result.earlier:
        lines += _remembered(old)
    lines += [f"warning    {told}" for told in result.warnings]
    kept = f", {adapter.trainable:,} kept" if adapter.trainable != result.trainable else ""
    lines.append(
        f"size       {result.trainable:,} numbers trained ({result.trainable_share:.2%} of the base){kept}; "
        f"adapter {size(result.adapter_bytes)}, base {size(result.base_bytes)}"
    )
    lines.append(f"saved      {output / ADAPTER}")
    lines.append(f"next       {program()} eval {output} DATA  ·  {program()} predict {output} FILE")
    console.print("\n".join(lines))


def _remembered(old: dict[str, object]) -> list[str]:
    about = f"{old['rows']} held-out rows of {old['data']}, learned before"
    if "missing" in old:
        return [f"unknown    what it still knows of {about}: {old['missing']}"]
    before, after = old["before"], old["after"]
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    lines = [f"remembers  {_changes(before, after)}  ({about})"]
    if after["loss"] > before["loss"] * (1 + FORGOTTEN):
        lines.append("warning    it forgets what it learned before: mix old rows in, e.g. data.train=[new, old]")
    return lines


def _changes(before: dict[str, float], after: dict[str, float]) -> str:
    return ", ".join(f"{name} {before[name]:.4g} → {value:.4g}" for name, value in after.items())
