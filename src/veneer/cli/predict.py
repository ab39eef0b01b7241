"""``veneer predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from veneer.cli.columns import POSITIVE


def predict_(
    adapter: Path,
    file: str,
    *,
    output: Path | None = None,
    split: str = "test",
    batch_size: Annotated[int, Parameter(validator=POSITIVE)] = 16,
    max_new_tokens: Annotated[int | None, Parameter(validator=POSITIVE)] = None,
    base_model: str | None = None,
    columns: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
) -> None:
    """Answer every row of a file.

    Writes each row with its answer: for text generation ``output``, and whether it was ``finished``; for
    classification ``label`` and the ``probabilities`` of all labels. Where the file has such a column already, the
    answer's is called ``predicted_…``.

    Examples:

        veneer predict runs/answers questions.jsonl

        veneer predict runs/mails inbox.csv --output labelled.csv --columns text=body

    Parameters
    ----------
    adapter
        An adapter folder, or a run's folder.
    file
        Rows with prompt, messages or text.
    output
        A .jsonl or .csv file; by default FILE's name with .predictions.jsonl, in this folder.
    split
        Split of a hub or catalogue data set.
    batch_size
        Rows a batch.
    max_new_tokens
        Longest answer; by default half again as long as the longest learned from.
    base_model
        Where to find the base, if not where the adapter says.
    columns
        Columns under other names, e.g. text=body; those of the training are known.
    """
    from veneer.cli.columns import mapping
    from veneer.cli.output import console
    from veneer.evaluation import predict_file
    from veneer.tasks import load_adapter

    target = output or Path(f"{Path(file).stem}.predictions.jsonl")
    loaded = load_adapter(adapter, base=base_model)
    longest = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    count, cut = predict_file(
        loaded, file, target, split=split, columns=mapping(columns), batch_size=batch_size, **longest
    )
    console.print(f"{count} rows → {target}")
    if cut:
        console.print(f"{cut} answers were cut short; --max-new-tokens allows longer ones.")
