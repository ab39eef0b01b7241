"""``veneer predict``."""

from __future__ import annotations

from pathlib import Path


def predict_(
    adapter: Path,
    file: str,
    *,
    output: Path | None = None,
    split: str = "test",
    batch_size: int = 16,
    base_model: str | None = None,
    columns: tuple[str, ...] = (),
) -> None:
    """Answer every row of a file.

    Writes each row with its answer: for text generation ``output``, for classification ``label`` and the
    ``probabilities`` of all labels.

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
    base_model
        Where to find the base, if not where the adapter says.
    columns
        Columns under other names, e.g. text=body.
    """
    from veneer.cli.columns import mapping
    from veneer.cli.output import console
    from veneer.evaluation import predict_file
    from veneer.tasks import load_adapter

    target = output or Path(f"{Path(file).stem}.predictions.jsonl")
    loaded = load_adapter(adapter, base=base_model)
    count = predict_file(loaded, file, target, split=split, columns=mapping(columns), batch_size=batch_size)
    console.print(f"{count} rows → {target}")
