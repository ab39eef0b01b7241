"""The parts of the documentation that the code knows best: ``python -m veneer.cli.reference docs``.

Writes ``commands.md`` from the commands' help, and fills the tables of settings in `PAGES`.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from veneer.cli.__main__ import COMMANDS, build
from veneer.storage import write_text

_HEAD = """\
# Commands

Written from the commands' own help by `make docs`; `veneer COMMAND --help` says the same. The keys of configs are on
[their own page](configs.md). A mistake gives one message on stderr and exit code 2; Ctrl-C gives 130.

"""
PAGES = ("configs.md", "distilling.md", "comparing.md")
"""Pages with tables of settings."""
_TABLE = re.compile(r"(<!-- settings: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> str:
    """The page of all commands."""
    listed = "\n".join(f"- [`veneer {name}`](#{name}): {summary}" for name, summary in COMMANDS.items())
    parts = [build(name)[name].generate_docs(usage_name=f"veneer {name}", heading_level=2).strip() for name in COMMANDS]
    # Of a command with commands below it cyclopts lists these twice, and tells how this very module is called.
    parts = [re.sub(r"## Table of Contents\n\n(- .*\n)+\n|(?<= )-m \S+ ", "", part) for part in parts]
    return f"{_HEAD}{listed}\n\n" + "\n\n".join(parts) + "\n"


def filled(page: str) -> str:
    """A page with a table of its settings after each marker ``<!-- settings: PREFIX CLASS -->``, up to the end's."""

    def table(match: re.Match[str]) -> str:
        start, prefix, path, end = match.groups()
        module, _, name = path.rpartition(".")
        return start + settings(getattr(importlib.import_module(module), name), prefix.strip("-")) + end

    return _TABLE.sub(table, page)


def settings(cls: type[BaseModel], prefix: str) -> str:
    """The table of a model's fields."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            continue  # a section, with a table of its own
        shown = "needed" if default is PydanticUndefined else f"`{_plain(default)}`" if default is not None else "none"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {shown} | {meaning} |")
    return "\n".join(rows) + "\n"


def _plain(value: object) -> str:
    """As one would write it in YAML."""
    return json.dumps(value) if isinstance(value, bool | tuple | dict) else str(value)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_text(folder / "commands.md", commands())
    for page in PAGES:
        write_text(folder / page, filled((folder / page).read_text(encoding="utf-8")))
