"""``veneer methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from veneer.methods import Method


def methods_(
    name: str | None = None,
    *,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """List the PEFT methods, or show the settings of one.

    Examples:

        veneer methods

        veneer methods lora

    Parameters
    ----------
    name
        A method, to see its settings.
    json
        Print JSON on stdout.
    """
    import inspect
    import sys

    from veneer.cli.output import console, print_json, table
    from veneer.methods import method_class, methods

    if name is None:
        known = methods()
        if json:
            print_json([_about(cls) for cls in known.values()])
        else:
            console.print(table(("method", "what it is"), [(cls.name, cls.summary) for cls in known.values()]))
        return
    cls = method_class(name)
    if json:
        print_json({**_about(cls), "settings": cls.model_json_schema()["properties"]})
        return
    console.print(inspect.getdoc(sys.modules[cls.__module__]) or cls.summary, markup=False)
    fields = [
        (field, str(info.get_default(call_default_factory=True)), info.description or "")
        for field, info in cls.model_fields.items()
    ]
    if fields:
        console.print()
        console.print(table(("setting", "default", "meaning"), fields))


def _about(cls: type[Method]) -> dict[str, Any]:
    return {"name": cls.name, "aliases": cls.aliases, "summary": cls.summary, "peft_type": cls.peft_type}
