"""`veneer methods`: what it tells of each method is what the contract harness holds the method to."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

import veneer
from helpers import command
from veneer.adapters.facts import facts
from veneer.methods import Method, method_class, methods

sys.path.insert(0, str(Path(__file__).parent.parent / "methods"))
from contracts import CONTRACTS

README = Path(__file__).parent.parent.parent / "README.md"


def own() -> dict[str, type[Method]]:
    """veneer's, without those that tests define."""
    return {name: cls for name, cls in methods().items() if cls.__module__.startswith("veneer.")}


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("methods") == 0
    table = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", table, re.M) for name in own())
    assert re.search(r"^houlsby .* Bottleneck +no +yes", table, re.M)
    assert command("methods", "--json") == 0
    told = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(told) >= set(own())
    keys = {"name", "aliases", "summary", "paper", "deltas", "mergeable", "row_mixable", "peft_type", "learning_rate"}
    assert all(set(entry) == keys for entry in told.values())
    assert told["dora"]["deltas"] == ["LowRank", "Scale"]
    assert told["houlsby"]["aliases"] == ["adapter-bert"]
    assert told["lora"]["paper"] == "Hu et al. 2021, arXiv:2106.09685"
    assert told["head"]["paper"] is None
    for name, contract in CONTRACTS.items():  # found by trying here, promised and proved there
        facts, cls = told[contract.method or name], method_class(contract.method or name)
        assert facts["mergeable"] == (None if cls.of_members else contract.merges), name
        assert facts["row_mixable"] == (None if cls.of_members else cls.row_mixable), name


def test_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("methods", "adapter-bert") == 0
    page = " ".join(capsys.readouterr().out.split())
    for told in ("W_u · act(W_d h + b_d)", "Houlsby et al. 2019", "acts by Bottleneck", "merges no", "bottleneck 64"):
        assert told in page, told
    assert command("methods", "lora", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["settings"]) == set(veneer.LoRA.model_fields)


@pytest.mark.parametrize("name", sorted(own()))
def test_papers_are_those_of_the_docstrings(name: str) -> None:
    cls = method_class(name)
    source = sys.modules[cls.__module__].__doc__ or ""
    assert cls.paper or "arXiv:" not in source, f"{cls.__name__} names no paper, its docstring does"
    for part in cls.paper.split(", "):
        assert part.removesuffix(cls.paper.split(", ")[0][-5:]) in " ".join(source.split())


def test_readme_lists_every_method() -> None:
    rows = re.findall(r"^\| (`.*?) \| .* \| ([^|]+) \|$", README.read_text(encoding="utf-8"), re.M)
    named = {tuple(re.findall(r"`([\w-]+)`", first)): merges for first, merges in rows}
    listed = {name for names in named for name in names}
    assert set(own()) - listed == set(), "methods without a row in README.md's table"
    for (name, *more), merges in ((names, merges) for names, merges in named.items() if names):
        if not more and name in CONTRACTS:
            assert merges.startswith("no") != CONTRACTS[name].merges, name


def test_a_method_that_cannot_be_tried(capsys: pytest.CaptureFixture[str]) -> None:
    class Needy(Method):
        """Needs a setting, and breaks."""

        name: ClassVar[str] = "needy"
        summary: ClassVar[str] = "cannot do without a setting"
        learning_rate: ClassVar[float] = 1.0
        peft_type: ClassVar[str] = "TOY_NEEDY"
        what: str

        def sites(self, sites: Any) -> Any:
            raise ZeroDivisionError

        def lower(self, site: Any, parameters: Any, step: Any) -> Any: ...

    assert facts(Needy) is None
    Needy.example = {"what": "it"}
    assert facts(Needy) is None
    assert command("methods", "needy") == 0
    assert re.search(r"what +needed", capsys.readouterr().out)
    assert command("methods", "needy", "--json") == 0
    assert json.loads(capsys.readouterr().out)["deltas"] is None


def test_what_depends_on_members_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("methods", "mix") == 0
    assert re.search(r"merges +as its methods", capsys.readouterr().out)
    assert command("methods", "mix", "--json") == 0
    assert json.loads(capsys.readouterr().out)["mergeable"] is None
