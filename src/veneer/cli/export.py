"""``veneer export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def export_(
    adapter: Path,
    output: Path,
    *,
    to: str,
    rank: int | None = None,
    base_model: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write an adapter as another method's: as plain LoRA, say, which vLLM, SGLang, TGI, LoRAX and llama.cpp read.

    What is low-rank by construction (vera, loha, adalora, lora with any start) is written exactly. Whatever else
    changes linear maps only is approximated to a rank, and the error told.

    Examples:

        veneer export runs/vera exported/vera-as-lora --to lora

        veneer export runs/dora exported/dora-as-lora --to lora --rank 32

    Parameters
    ----------
    adapter
        An adapter folder, or a run's folder.
    output
        The adapter folder to write.
    to
        The method to write it as.
    rank
        Rank to approximate to, where it can't be exact.
    base_model
        Where to find the base, if not where the adapter says.
    json
        Print JSON on stdout.
    """
    from veneer.adapters.convert import converted
    from veneer.cli.output import console, print_json
    from veneer.errors import OutputError
    from veneer.methods import method_class
    from veneer.tasks import load_adapter

    method = method_class(to)
    if output.exists():
        raise OutputError(f"{output} exists already; give a new folder.")
    loaded = load_adapter(adapter, base=base_model)
    new, errors = converted(loaded, method, "exported", rank)
    new.save(output)
    worst = max(errors, key=lambda path: errors[path])
    if json:
        print_json({"output": str(output), "method": to, "errors": errors})
        return
    console.print(f"{adapter} ({loaded.method.name}) written as {to} → {output}")
    if errors[worst]:
        mean = sum(errors.values()) / len(errors)
        console.print(
            f"error of the change of each map: {mean:.2%} on average, {errors[worst]:.2%} at most ({worst}); "
            "check with `veneer eval` that it does as well, or raise --rank"
        )
    else:
        console.print("exact: every map's change is the same")
