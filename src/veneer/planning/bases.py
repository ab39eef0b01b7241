"""How large a base can be: the largest well-known ones of a kind whose training fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from veneer.bases.catalogue import CATALOGUE
from veneer.bases.known import KNOWN, Known
from veneer.errors import ConfigError
from veneer.methods import method_class
from veneer.methods.registry import DEFAULT
from veneer.planning.machine import machine
from veneer.planning.plan import HEADROOM, Begin, MethodPlan, Request, plan

WAYS: tuple[Mapping[str, object], ...] = ({}, {"checkpointing": True}, {"checkpointing": True, "quantize": "nf4"})
"""How to train, from the quickest to the most frugal."""
_KINDS = {"AutoModelForCausalLM": "decoder", "AutoModel": "encoder", "AutoModelForSeq2SeqLM": "encoder-decoder"}


@dataclass(frozen=True)
class Candidate:
    """The largest base that fits, trained in some way.

    Attributes:
        base: its name.
        parameters: how many it has.
        checkpointing: whether activations are computed again for it to fit.
        quantize: how its weights are quantised for it to fit.
        row: what the default method takes on it.
        catalogued: whether its weights can be had without a hub.
    """

    base: str
    parameters: int
    checkpointing: bool
    quantize: str | None
    row: MethodPlan
    catalogued: bool


def largest(request: Request, kinds: tuple[str, ...], begin: Begin = lambda name, left: None) -> list[Candidate]:
    """The largest base that fits, for each way of training; those larger than the one before only.

    Args:
        request: but for its base and methods.
        kinds: of base that suit the task; the first is tried only.
        begin: told each base as it begins.

    Raises:
        ConfigError: not even the smallest fits.
    """
    memory = request.memory or machine(request.device).memory
    method = method_class(DEFAULT)()
    rows = {row.name: row for row in KNOWN.values() if _KINDS[row.auto_class] == kinds[0]}
    found: list[Candidate] = []
    for number, way in enumerate(WAYS, 1):
        later = (len(WAYS) - number) * len(rows).bit_length()
        wanted = replace(request, methods=[method], memory=memory, **way)  # type: ignore[arg-type]
        bits = 0.55 if wanted.quantize else 2.0  # bytes a weight at the least: those that can't fit are not tried
        fitting = [row for row in rows.values() if row.parameters * bits <= memory * (1 - HEADROOM)]
        told = partial(_later, begin, later)
        best = _largest(wanted, sorted(fitting, key=lambda row: row.parameters), told)
        if best is not None and (not found or best.parameters > found[-1].parameters):
            found.append(best)
    if not found:
        raise ConfigError(
            "No base known by its sizes fits into this memory with this batch; lower train.batch_size or --length."
        )
    return found


def _later(begin: Begin, later: int, name: str, left: int) -> None:
    begin(name, left + later)


def _largest(request: Request, rows: list[Known], begin: Begin = lambda name, left: None) -> Candidate | None:
    """By halves: what a larger base takes is taken to be more."""
    rows = list(rows)
    low, high, best = 0, len(rows), None
    while low < high:
        middle = (low + high) // 2
        known = rows[middle]
        begin(known.name, (high - low).bit_length())
        try:
            (row,) = plan(replace(request, base=known.name)).methods
        except ConfigError:  # it can't be trained so: without checkpointing, say, or with rows as long
            del rows[middle]
            high -= 1
            continue
        if row.fits:
            there = known.name in CATALOGUE or any(name in CATALOGUE for name in known.also)
            best = Candidate(known.name, known.parameters, request.checkpointing, request.quantize, row, there)
            low = middle + 1
        else:
            high = middle
    return best
