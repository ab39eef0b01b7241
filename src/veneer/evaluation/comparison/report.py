"""The folder of results: ``results.json``, ``results.csv``, ``README.md`` and ``index.html``."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.evaluation.comparison.analysis import Findings, analyse
from veneer.evaluation.comparison.claims import Verdict, verdicts
from veneer.evaluation.comparison.config import CompareConfig
from veneer.evaluation.comparison.page import page
from veneer.evaluation.comparison.runner import Done
from veneer.evaluation.comparison.tables import plain, to_csv, to_markdown
from veneer.storage import write_json, write_text

JSON, CSV, MARKDOWN, HTML = "results.json", "results.csv", "README.md", "index.html"


def write(config: CompareConfig, done: Sequence[Done]) -> tuple[Findings, list[Verdict]]:
    """Write all of it; what was found."""
    found = analyse(done)
    told = verdicts(found)
    write_json(config.output / JSON, plain(config, found, told))
    write_text(config.output / CSV, to_csv(found))
    write_text(config.output / MARKDOWN, to_markdown(config, found, told))
    write_text(config.output / HTML, page(config, found, told))
    return found, told
