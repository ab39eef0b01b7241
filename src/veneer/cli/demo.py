"""``veneer demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

SHOWN = 3


def demo_(
    *,
    output: Path = Path("adapters/demo"),
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Train a real model on a real task, in minutes, and prove what it learned.

    SmolLM2-135M-Instruct learns to answer with JSON whether a message tries to manipulate an AI assistant. Base
    and adapter then answer the same held-out messages. Fetches 97 MB once; takes about four minutes on 2 cores.

    Examples:

        veneer demo

        veneer demo --output adapters/injections --json

    Parameters
    ----------
    output
        Where the adapter goes.
    json
        Print one JSON object on stdout.
    """
    from veneer.bases.catalogue import CATALOGUE
    from veneer.cli.output import console, print_json, table
    from veneer.demo import BASE, demo
    from veneer.evaluation import Score
    from veneer.training.progress import console as progress
    from veneer.training.progress import duration, program, size

    result, report, rows = demo(output, say=lambda text: progress.print(f"[bold]{text}[/bold]"))
    assert report.base is not None
    assert report.base_predictions is not None
    before, after = report.base["json_match"], report.adapter["json_match"]
    if json:
        print_json(
            {
                "task": "prompt injection verdict as JSON",
                "rows_held_out": report.rows,
                "base_score": before.value,
                "base_interval": [before.low, before.high],
                "adapter_score": after.value,
                "adapter_interval": [after.low, after.high],
                "trainable_share": result.trainable_share,
                "adapter_bytes": result.adapter_bytes,
                "base_bytes": result.base_bytes,
                "train_seconds": result.seconds,
                "adapter_folder": str(output),
            }
        )
        return

    def shown(score: Score) -> str:
        return f"{score.value:.1%}  [{score.low:.1%}, {score.high:.1%}]"

    console.print()
    sides = zip(rows, report.base_predictions, report.predictions, strict=True)
    asked = [
        (_short(row["message"], 34), _marked(row, base), _marked(row, ours))
        for row, base, ours in _some_of_each(list(sides))
    ]
    console.print(table(("message", "base", "adapter"), asked))
    console.print()
    console.print(f"right answers, as valid JSON ({report.rows} held-out messages, 95 % intervals)")
    console.print(f"  base     {shown(before)}")
    console.print(f"  adapter  {shown(after)}")
    console.print(
        f"trained {result.trainable:,} numbers, {result.trainable_share:.2%} of the base, "
        f"in {duration(result.seconds)}; "
        f"adapter {size(result.adapter_bytes)} in {output}, base {size(result.base_bytes)}"
    )
    console.print(f"The base is {BASE}; {CATALOGUE[BASE].note}.")
    console.print("\nNext:")
    prompt = rows[0]["prompt"].replace("\n", " ").replace('"', '\\"')
    console.print(f'  {program()} generate "{prompt}" --adapter {output} --compare', markup=False, soft_wrap=True)
    console.print(
        f"  {program()} train base={BASE} data.train=YOUR_FILE.jsonl output=runs/first"
        '   # rows: {"prompt": "...", "completion": "..."}',
        markup=False,
        soft_wrap=True,
    )


def _some_of_each(sides: list[tuple[Any, Any, Any]]) -> list[tuple[Any, Any, Any]]:
    """The first few with each right answer."""
    answers = sorted({row["completion"] for row, _, _ in sides})
    return [side for answer in answers for side in [s for s in sides if s[0]["completion"] == answer][:SHOWN]]


def _marked(row: dict[str, Any], prediction: dict[str, Any]) -> str:
    from veneer.tasks.causal_lm import parsed

    right = parsed(prediction["output"]) == parsed(row["completion"])
    return f"{'✓' if right else '✗'} {_short(prediction['output'], 20)}"


def _short(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
