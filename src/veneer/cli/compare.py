"""``veneer compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from veneer.cli.columns import POSITIVE

_EXPLAIN = """\
Nothing to compare yet. Say which methods, over which base, on which data, and where the results go:

  veneer compare base=minilm-l6 'entries=[lora, ia3]' data.train=mails.csv data.test=held_out.csv output=runs/compare

`veneer compare --help` shows more."""


def compare_(
    *arguments: str,
    jobs: Annotated[int, Parameter(validator=POSITIVE)] = 1,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Compare methods, bases or settings on the same data, with full fine-tuning, a head alone and the plain base.

    Every run is a process of its own, with several seeds each. OUTPUT gets index.html (one page with charts),
    README.md (the table), results.csv and results.json: quality with intervals and paired tests, forgetting, trained
    and stored size, memory, time, energy where it is known. A comparison that was cut off goes on when the same
    command is given again; runs that are finished are not run again, so entries and seeds can be added later, too.

    Examples:

        veneer compare compare.yaml

        veneer compare base=minilm-l6 'entries=[lora, ia3]' data.train=mails.csv data.test=new.csv output=runs/compare

        veneer compare compare.yaml seeds=5 --jobs 2

    A config:

        base: minilm-l6
        entries: [lora, ia3, {name: lora, rank: 2}]   # methods; full fine-tuning and the head alone are added
        data: {train: mails.csv, test: held_out.csv}
        train: {epochs: 2, batch_size: 16}
        seeds: 3
        output: runs/compare

    Parameters
    ----------
    arguments
        A YAML config (optional), then key=value overrides.
    jobs
        Runs at a time. Times are comparable where nothing else runs: with 1.
    json
        Print what was found as one JSON object on stdout.
    """
    from veneer.errors import ConfigError

    if not arguments:
        raise ConfigError(_EXPLAIN)
    from veneer.evaluation.comparison.config import read_compare_config

    has_file = "=" not in arguments[0]
    config, entries = read_compare_config(
        Path(arguments[0]) if has_file else None, arguments[1:] if has_file else arguments
    )

    from veneer.cli.output import console, print_json
    from veneer.evaluation.comparison.report import HTML, write
    from veneer.evaluation.comparison.runner import compare
    from veneer.evaluation.comparison.tables import plain, summary
    from veneer.training.progress import console as progress

    done = compare(config, entries, jobs=jobs, say=lambda text: progress.print(text, markup=False))
    found, told = write(config, done)
    if json:
        print_json(plain(config, found, told))
    else:
        console.print(summary(config, found), markup=False, soft_wrap=True)
        for verdict in told:
            console.print(f"{verdict.verdict:>13}  {verdict.claim} {verdict.because}", markup=False, soft_wrap=True)
        console.print(f"The page: {config.output / HTML}", markup=False, soft_wrap=True)
    if failed := sum(bool(each.result.get("error")) for each in done):
        progress.print(f"{failed} of {len(done)} runs failed; the same command tries them again.", markup=False)
    if not any(line.quality for line in found.lines):
        raise ConfigError(f"All runs failed; see {config.output / HTML}, and log.txt in the folders of runs.")
    if failed:
        sys.exit(1)
