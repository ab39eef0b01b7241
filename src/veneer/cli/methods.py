"""``veneer methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from veneer.adapters.facts import Facts
    from veneer.methods import Method


def methods_(
    name: str | None = None,
    *,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """List the PEFT methods, or show all about one: its mathematics, what is true of it, its settings.

    Of each is told by which forms of change it acts, whether it merges into the base's weights (where these have a
    place for it), and whether the rows of a batch can mix it with others. Packages add methods of their own by entry
    points of the group veneer.methods.

    Examples:

        veneer methods

        veneer methods lora

        veneer methods --json

    Parameters
    ----------
    name
        A method, to see its page.
    json
        Print JSON on stdout.
    """
    import inspect
    import sys

    from veneer.adapters.facts import facts
    from veneer.cli.output import console, print_json, table
    from veneer.methods import method_class, methods

    if name is None:
        known = methods()
        if json:
            print_json([_about(cls, facts(cls)) for cls in known.values()])
            return
        rows = [(cls.name, cls.summary, *_shown(cls, facts(cls))) for cls in known.values()]
        console.print(table(("method", "what it is", "acts by", "merges", "mixes by row"), rows))
        return
    cls = method_class(name)
    found = facts(cls)
    if json:
        settings = cls.model_json_schema().get("properties", {})
        print_json({**_about(cls, found), "settings": {k: v for k, v in settings.items() if k not in cls.outcomes}})
        return
    console.print(inspect.getdoc(sys.modules[cls.__module__]) or cls.summary, markup=False)
    console.print()
    deltas, merges, mixes = _shown(cls, found)
    told = {
        "name": ", ".join((cls.name, *cls.aliases)),
        "paper": cls.paper or "none",
        "acts by": deltas,
        "merges": merges,
        "mixes by row": mixes,
        "learning rate": f"{cls.learning_rate:g} unless train.learning_rate says otherwise",
        "in files": f"peft_type {cls.peft_type}",
    }
    console.print(table(("", ""), told.items()), markup=False)
    fields = [
        (field, _default(info), " ".join((info.description or "").split()))
        for field, info in cls.model_fields.items()
        if field not in cls.outcomes
    ]
    if fields:
        console.print()
        console.print(table(("setting", "default", "meaning"), fields))


def _about(cls: type[Method], found: Facts | None) -> dict[str, Any]:
    return {
        "name": cls.name,
        "aliases": cls.aliases,
        "summary": cls.summary,
        "paper": cls.paper or None,
        "deltas": found.deltas if found else None,
        "mergeable": found.mergeable if found else None,
        "row_mixable": found.row_mixable if found else None,
        "peft_type": cls.peft_type,
        "learning_rate": cls.learning_rate,
    }


def _shown(cls: type[Method], found: Facts | None) -> tuple[str, str, str]:
    """Forms, merging and mixing, for people."""
    if found is None:
        unknown = "as its methods" if cls.of_members else "as set"
        return unknown, unknown, unknown
    return (
        ", ".join(found.deltas) or "nothing",
        "yes" if found.mergeable else "no",
        "yes" if found.row_mixable else "no",
    )


def _default(info: FieldInfo) -> str:
    return "needed" if info.is_required() else str(info.get_default(call_default_factory=True))
