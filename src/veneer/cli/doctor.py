"""``veneer doctor``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter


def doctor_(*, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Check this machine, and train a tiny model on it.

    Shows the machine, the versions of the libraries beside the tested ones, the cache, whether the hub can be
    reached, and which extras are installed; then trains a tiny model on synthetic data for some seconds and checks
    that it learns, that saving, loading and merging change nothing, and that the base stays as it was. ✗ lines say
    what to do. Exits 1 if something fails that nothing works without.

    Worked examples:

        veneer doctor

        veneer doctor --json

    Parameters
    ----------
    json
        Print the checks as one JSON object on stdout.
    """
    import sys
    from dataclasses import asdict

    from veneer.cli.output import console, print_json
    from veneer.doctor import examine

    checks = []
    section = ""
    for check in examine():
        checks.append(check)
        if json:
            continue
        if check.section != section:
            section = check.section
            console.print(f"\n[bold]{section}[/bold]")
        mark = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "·"}[check.ok]
        console.print(f"{mark} {check.name:24}", end="")
        console.print(check.found, markup=False, soft_wrap=True)
        if check.ok is False:
            console.print(f"    → {check.advice}", markup=False, soft_wrap=True)
    failed = [check for check in checks if check.ok is False and check.essential]
    warned = [check for check in checks if check.ok is False and not check.essential]
    if json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        lesser = f"; {len(warned)} lesser things to look at" if warned else ""
        console.print(f"\n{'veneer does not work here yet.' if failed else 'veneer works here'}{lesser}")
    sys.exit(1 if failed else 0)
