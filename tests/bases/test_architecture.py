"""What is known of a base before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny_llama
from veneer.bases.architecture import architecture
from veneer.bases.catalogue import CATALOGUE
from veneer.bases.known import KNOWN
from veneer.errors import BaseError

ROWS = list({row.name: row for row in KNOWN.values()}.values())
FEW = {"llama-2-7b", "mixtral-8x7b", "bert-base", "t5-base", "flan-t5-small", "gpt2", "gemma-2-2b", "llama-3.1-405b"}


@pytest.mark.parametrize(
    "name", [pytest.param(row.name, marks=() if row.name in FEW else pytest.mark.slow) for row in ROWS]
)
def test_parameters_are_those_published(name: str) -> None:
    assert architecture(name).parameters == KNOWN[name].parameters


def test_well_known_totals() -> None:
    assert KNOWN["llama-2-7b"].parameters == 6_738_415_616
    assert KNOWN["mixtral-8x7b"].parameters == 46_702_792_704


def test_hub_ids_are_known_by_their_last_part() -> None:
    assert architecture("meta-llama/Llama-2-7b-hf").parameters == 6_738_415_616


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_the_catalogue_s_are_known_without_being_fetched(name: str) -> None:
    assert KNOWN[name].parameters == CATALOGUE[name].parameters


def test_a_folder(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "tiny")
    found = architecture(tmp_path / "tiny")
    assert found.parameters == sum(each.numel() for each in model.parameters())
    assert (found.layers, found.kind, found.period) == (2, "decoder", 1)
    assert found.with_layers(1).layers == 1
    assert found.layers == 2


def test_layers_that_alternate() -> None:
    assert architecture("gemma-2-2b").period == 2


def test_no_such_base() -> None:
    with pytest.raises(BaseError, match="Did you mean 'llama-2-7b'"):
        architecture("lama-2-7b")
    with pytest.raises(BaseError, match="no folder"):
        architecture("./nowhere")
