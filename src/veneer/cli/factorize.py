"""``veneer factorize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def factorize_(
    base: str,
    output: Path,
    *,
    rank: int | None = None,
    keep: float | None = None,
    targets: tuple[str, ...] = ("all-linear",),
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write a smaller base, its linear maps factored: W ≈ UV, by truncated singular value decomposition.

    This compresses the base itself and is no adapter. What is cut off is missed: train an adapter on the result to
    make up for it. veneer loads the folder as a base (`veneer train base=OUTPUT`); other programs don't.

    Examples:

        veneer factorize minilm-l6 bases/minilm-half --keep 0.5

        veneer factorize smollm2-135m-instruct bases/smollm2-thin --rank 128 --targets mlp

    Parameters
    ----------
    base
        A hub id, folder, .gguf file or catalogue name.
    output
        The base folder to write.
    rank
        Rank of every map.
    keep
        Or the share of its numbers that every map keeps.
    targets
        Which maps: all-linear, attention, mlp, roles, module names or /regular expressions/.
    json
        Print JSON on stdout.
    """
    from dataclasses import asdict

    from veneer.bases.factorize import factorize
    from veneer.cli.output import console, print_json

    report = factorize(base, output, rank=rank, keep=keep, targets=targets)
    if json:
        print_json({**asdict(report), "output": str(output)})
        return
    factored = [each for each in report.maps if each.rank is not None]
    errors = [each.error for each in factored]
    worst = max(factored, key=lambda each: each.error)
    for name, (before, after), unit in (("parameters", report.parameters, 1), ("MB", report.nbytes, 1_000_000)):
        console.print(f"{name:<10} {before / unit:,.0f} → {after / unit:,.0f} ({after / before:.0%})")
    left = f", {len(report.maps) - len(factored)} left whole as they would not get smaller"
    console.print(f"maps       {len(factored)} factored{left if len(factored) < len(report.maps) else ''}")
    console.print(
        f"error      {sum(errors) / len(errors):.1%} of a map on average, {worst.error:.1%} at most ({worst.path})"
    )
    console.print(f"written    {output}; compare it with {base} before you rely on it")
