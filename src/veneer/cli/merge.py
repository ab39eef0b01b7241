"""``veneer merge``."""

from __future__ import annotations

from pathlib import Path


def merge_(adapter: Path, output: Path, *, base_model: str | None = None) -> None:
    """Fold an adapter into its base and write the whole model.

    The result is an ordinary model folder: no veneer is needed to load it. The base stays as it is.

    Examples:

        veneer merge runs/answers models/answers-merged

    Parameters
    ----------
    adapter
        An adapter folder, or a run's folder.
    output
        The model folder to write.
    base_model
        Where to find the base, if not where the adapter says.
    """
    from veneer.bases.factored import write
    from veneer.bases.quiet import quiet
    from veneer.cli.output import console
    from veneer.errors import OutputError
    from veneer.storage import new_folder
    from veneer.tasks import adapter_task, load_adapter

    if output.exists():
        raise OutputError(f"{output} exists already; give a new folder.")
    loaded = load_adapter(adapter, base=base_model)
    model = loaded.merged()
    if loaded.task.get("name"):
        adapter_task(loaded).name_outputs(model.config)
    with new_folder(output) as folder, quiet():
        write(model, loaded.base.tokenizer, folder)
    console.print(f"{adapter} merged into {loaded.base.name} → {output}")
