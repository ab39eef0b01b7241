"""``veneer sites``."""

from __future__ import annotations

import re
from typing import Annotated

from cyclopts import Parameter


def sites_(
    base: str,
    *,
    task: str | None = None,
    targets: tuple[str, ...] = (),
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Show where a method can act in a base: the words for `targets`, and what they pick.

    Examples:

        veneer sites smollm2-135m-instruct

        veneer sites minilm-l6 --targets attention --targets /layer.[01]/

    Parameters
    ----------
    base
        A hub id, folder, .gguf file or catalogue name.
    task
        The task to load it for, by name.
    targets
        Show only what these pick.
    json
        Print JSON on stdout.
    """
    from dataclasses import asdict

    from veneer.cli.output import console, print_json, table
    from veneer.tasks import load_base

    loaded = load_base(base, task=task)
    chosen = loaded.sites.resolve(list(targets)) if targets else list(loaded.sites.everything)
    if json:
        print_json({"base": base, "words": loaded.sites.words(), "sites": [asdict(site) for site in chosen]})
        return
    alike: dict[tuple[str, ...], int] = {}
    for site in chosen:
        place = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", site.path)
        row = (place, site.kind, site.role or "", site.group or "", f"{site.in_features} → {site.out_features}")
        alike[row] = alike.get(row, 0) + 1
    rows = [(*row, str(count)) for row, count in alike.items()]
    console.print(table(("module", "kind", "role", "group", "width ", "count "), rows))
    console.print(f"attention layers (for keys and values): {len(loaded.sites.attention)}")
    console.print(
        f"words for targets: {', '.join(loaded.sites.words())}, or a module's name, or /a regular expression/"
    )
