"""``veneer sites``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from rich.tree import Tree

    from veneer.bases import Site


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

    from veneer.cli.output import console, print_json
    from veneer.tasks import load_base

    loaded = load_base(base, task=task)
    chosen = loaded.sites.resolve(list(targets)) if targets else list(loaded.sites.everything)
    if json:
        print_json({"base": base, "words": loaded.sites.words(), "sites": [asdict(site) for site in chosen]})
        return
    console.print(_tree(base, chosen))
    console.print(f"attention layers (for keys and values): {len(loaded.sites.attention)}")
    console.print(
        f"words for targets: {', '.join(loaded.sites.words())}, or a module's name, or /a regular expression/"
    )


def _tree(base: str, sites: Sequence[Site]) -> Tree:
    """The sites by where they lie, layers that are alike on one branch."""
    from rich.markup import escape
    from rich.tree import Tree

    branches = {"": Tree(f"[bold]{escape(base)}[/bold]")}

    def branch(path: str) -> Tree:
        if path not in branches:
            parent, _, name = path.rpartition(".")
            branches[path] = branch(parent).add(escape(name))
        return branches[path]

    alike: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        place = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", site.path)
        alike.setdefault((place, f"{site.in_features:,} → {site.out_features:,}"), []).append(site)
    for (place, width), found in alike.items():
        parent, _, name = place.rpartition(".")
        site, times = found[0], f" ×{len(found)}" if len(found) > 1 else ""
        kind = ", ".join(dict.fromkeys(word for word in (site.kind, site.group, site.role) if word))
        stack = f" in a stack of {site.count}" if site.count else ""
        branch(parent).add(f"[bold]{escape(name)}[/bold]  {kind}  [dim]{width}{stack}{times}[/dim]")
    return branches[""]
