"""``veneer adapters``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def adapters_(
    action: Literal["verify"],
    folder: Path,
    *,
    base: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Check that an adapter folder is intact, before it is shared, moved or loaded.

    Looks at links, config, record, hashes, the weights' header, sizes, types and values; with --base also at the
    base's fingerprint, the shapes, and whether the adapter changes anything. Exits 0 if nothing is wrong (there may
    be warnings), 1 if something is, 2 if there is no such folder.

    Examples:

        veneer adapters verify runs/answers

        veneer adapters verify downloads/support --base smollm2-135m-instruct --json

    Parameters
    ----------
    action
        verify.
    folder
        An adapter folder, or a run's folder.
    base
        The base to check it against: a hub id, folder or catalogue name.
    json
        Print one JSON object on stdout.
    """
    import sys
    from dataclasses import asdict

    from veneer.adapters.files import adapter_folder
    from veneer.adapters.verify import verify
    from veneer.cli.output import console, print_json
    from veneer.tasks import load_base_for

    checks = verify(folder, (lambda: load_base_for(folder, base)) if base is not None else None)
    intact = all(check.state != "error" for check in checks)
    if json:
        found = adapter_folder(folder)
        print_json({"adapter_folder": str(found), "intact": intact, "checks": [asdict(check) for check in checks]})
    else:
        marks = {"ok": "[green]✓[/green]", "warning": "[yellow]![/yellow]", "error": "[red]✗[/red]", "unchecked": "·"}
        for check in checks:
            console.print(f"{marks[check.state]} {check.what:<8} ", end="")
            console.print(check.note, markup=False)
        console.print(f"{folder} is {'intact' if intact else 'not intact'}.")
    if not intact:
        sys.exit(1)
