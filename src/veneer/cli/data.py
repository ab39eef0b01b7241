"""``veneer data``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.validators import Number

from veneer.cli.columns import POSITIVE

SHARE = Number(gt=0, lt=1)
PARTS = ("train", "validation", "test")

data_ = App(
    name="data",
    help="Check a data file before it is learned from, or part it into train, validation, test.",
    help_epilogue="""Examples:

    veneer data check answers.jsonl --base smollm2-135m-instruct

    veneer data split answers.jsonl --output parts --test 0.1""",
    help_format="plaintext",
)


@data_.command(help_epilogue="")
def check(
    file: str,
    *,
    base: str | None = None,
    task: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    max_length: Annotated[int | None, Parameter(validator=POSITIVE)] = None,
    max_truncated: Annotated[float | None, Parameter(validator=Number(gte=0, lte=1))] = None,
    columns: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Report on a data file: lengths, cut rows, duplicates, leaks, labels; the same as before training.

    Exit code 0: no errors, at most warnings; 1: errors; 2: unreadable, or bad rows.

    Examples:

        veneer data check answers.jsonl

        veneer data check train.csv --base minilm-l6 --validation held_out.csv

    Parameters
    ----------
    file
        A file, folder, hub id or catalogue name.
    base
        What will be trained: its tokenizer counts the tokens. Its weights are not loaded.
    task
        What will be trained for; by default what the columns ask for.
    validation
        Data to validate on: checked too, and against the training data.
    test
        Likewise, data to test on.
    max_length
        Longest input in tokens, as task.max_length.
    max_truncated
        Share of rows that may be cut or left out, as data.max_truncated.
    columns
        Columns under other names, e.g. prompt=question.
    json
        Print one JSON object on stdout.
    """
    from rich.console import Console

    from veneer.cli.columns import mapping
    from veneer.cli.output import console, print_json
    from veneer.data import Part, read
    from veneer.data.report import MAX_TRUNCATED
    from veneer.errors import ConfigError
    from veneer.tasks import check_data, choose_task, load_base, task_class

    if base is None and (max_length is not None or max_truncated is not None):
        raise ConfigError("--max-length and --max-truncated are about tokens; say with --base whose tokens to count.")
    names = mapping(columns)
    sources = {"training": (file, "train"), "validation": (validation, "validation"), "test": (test, "test")}
    parts = [
        Part(name, read(source, split=split, columns=names, numbered=True), source, split)
        for name, (source, split) in sources.items()
        if source is not None
    ]
    cls = task_class(task) if task else choose_task(parts[0].rows)
    loaded = load_base(base, task=cls.name, weights=False) if base else None
    settings: dict[str, Any] = {} if max_length is None else {"max_length": max_length}
    chosen = cls.for_rows(parts[0].rows, loaded, **settings)
    most = MAX_TRUNCATED if max_truncated is None else max_truncated
    report = check_data(chosen, loaded, parts, max_truncated=most, say=Console(stderr=True).print).report
    if json:
        print_json({"file": file, "base": base, "task": chosen.name, **report.plain()})
    else:
        for line in report.lines():
            console.print(line, markup=False, soft_wrap=True)
        for finding in report.findings:
            console.print(f"[{'red' if finding.level == 'error' else 'yellow'}]{finding.level}:[/] ", end="")
            console.print(f"{finding.part}: {finding.message}", markup=False, soft_wrap=True)
        if not report.findings:
            console.print("no problems found" + ("" if base else "; with --base NAME, tokens are counted, too"))
    if report.errors:
        sys.exit(1)


@data_.command(help_epilogue="")
def split(
    file: str,
    *,
    output: Path,
    validation: Annotated[float, Parameter(validator=SHARE)] = 0.1,
    test: Annotated[float | None, Parameter(validator=SHARE)] = None,
    stratify: str | None = None,
    group: str | None = None,
    time: str | None = None,
    seed: int = 0,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Part a data file into train, validation and test, in its own format, each row as it stands.

    At random; or by a column, given to one of --stratify, --group and --time.

    Examples:

        veneer data split answers.jsonl --output parts --validation 0.1 --test 0.1

        veneer data split mails.csv --output parts --stratify label

        veneer data split notes.jsonl --output parts --group patient

        veneer data split tickets.csv --output parts --time opened

    Parameters
    ----------
    file
        A JSONL, JSON, CSV, TSV or Parquet file, or a catalogue name.
    output
        Folder for the parts; it must not exist yet, or be empty.
    validation
        Share of the rows for validation.
    test
        Share of the rows for testing; by default none.
    stratify
        Column whose values are to have the same shares in all parts, such as label.
    group
        Column whose equal values are to stay in one part, such as an author.
    time
        Column of numbers or ISO 8601 dates: training comes before validation before test.
    seed
        Of the random choice.
    json
        Print one JSON object on stdout.
    """
    from veneer.cli.output import console, print_json, table
    from veneer.data.parting import part_file

    by = {"stratified": stratify, "group": group, "time": time}
    shares = {"validation": validation} | ({} if test is None else {"test": test})
    written = part_file(file, output, shares, by=by, seed=seed)
    if json:
        print_json({"file": file, "parts": {name: vars(part) for name, part in written.items()}})
        return
    console.print(table(("part", "rows ", "file"), [(name, f"{p.rows:,}", p.file) for name, p in written.items()]))
