"""Writes docs/coverage.md: every method on every family, works or can't and why.

    python tests/methods/coverage.py

What works is what tests/methods/test_contract.py and test_rows.py prove, cell by cell.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from contracts import CONTRACTS, method  # noqa: E402
from families import FAMILIES, Family  # noqa: E402

import veneer  # noqa: E402
from veneer.errors import TargetError  # noqa: E402

PAGE = HERE.parent.parent / "docs" / "coverage.md"
INTRO = """# Coverage

Every method on one small model of every family. Written by `python tests/methods/coverage.py`; what works (✓) is proved
cell by cell by `make test-all` (`tests/methods/`): identity at the start where promised, base bit-identical, gradients
against finite differences, merged equal to adapted, save and load, checkpointing, generation with and without cache and
padding, and batches that mix all kinds row by row, all in float64. Besides, `tests/methods/test_against_peft.py` compares outputs
and gradients with peft's.

*checkpointing*: activations can be recomputed. On every family a batch may mix adapters of all kinds and plain rows, but
for `full`, whose rows share no weights with the base.

"""


def reason(name: str, family: Family) -> str | None:
    """Why this method can't be on this family, or None."""
    try:
        veneer.Base(family.model()).attach(method(name))
    except TargetError as error:
        return str(error)
    return None


def page() -> str:
    """The page's text."""
    reasons: list[str] = []
    lines = [f"| method | {' | '.join(FAMILIES)} |", "|---" * (len(FAMILIES) + 1) + "|"]
    for name in sorted(CONTRACTS):
        cells = []
        for family in FAMILIES.values():
            why = reason(name, family)
            if why is not None and why not in reasons:
                reasons.append(why)
            cells.append("✓" if why is None else f"[{reasons.index(why) + 1}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    checkpointed = ["✓" if family.checkpoints else "no" for family in FAMILIES.values()]
    lines.append(f"| *checkpointing* | {' | '.join(checkpointed)} |")
    notes = [f"{number}. {why}" for number, why in enumerate(reasons, 1)]
    more = [
        "",
        "transformers has no activation checkpointing for ALBERT and XLNet. ALBERT's one layer, used repeatedly, has one",
        "prefix for all its uses. Experts of mixtures are LoRA's alone (`targets: experts`), as in peft. Houlsby's bottlenecks",
        "in XLNet follow the feed-forward blocks only: the attention's output has no module of its own before the residual.",
    ]
    return INTRO + "\n".join([*lines, "", *notes, *more]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
