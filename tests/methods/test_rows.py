"""One batch, each row its own adapter of any kind, or none: the same as each row alone."""

from __future__ import annotations

import pytest
import torch
from contracts import CONTRACTS, method, trained
from families import FAMILIES, IDS, Family, run
from test_contract import ALWAYS, EXACT, off

import veneer
from helpers import perturb, tiny_bert
from veneer.errors import AdapterError, TargetError, UnknownName

EVERY = [
    pytest.param(family, id=family.name, marks=() if family.name in ALWAYS else pytest.mark.slow)
    for family in FAMILIES.values()
]


def everything_attached(family: Family) -> tuple[veneer.Base, list[str | None]]:
    """Two adapters of every kind that goes on this family, and a batch with them all and plain rows between."""
    base = veneer.Base(family.model().requires_grad_(False))
    names: list[str | None] = [None]
    for number, name in enumerate(sorted(CONTRACTS)):
        if not method(name).row_mixable:
            continue
        for copy in range(2):
            try:
                adapter = base.attach(method(name), f"{name}{copy}", seed=copy).double()
            except TargetError:
                continue
            trained(adapter, name, seed=10 * number + copy)
            names += [adapter.name] if copy else [adapter.name, None]
    return base, [*names[1:], "lora0"]


def batch_of(family: Family, rows: int) -> dict[str, torch.Tensor]:
    """As many different rows as asked for."""
    batch = {}
    for name, value in family.inputs.items():
        repeated = torch.cat([value.roll(n, -1) for n in range(rows)])[:rows]
        batch[name] = repeated
    return batch


@pytest.mark.parametrize("family", EVERY)
def test_a_mixed_batch_equals_each_row_alone(family: Family) -> None:
    base, names = everything_attached(family)
    batch = batch_of(family, len(names))
    with torch.no_grad():
        with base.rows(names):
            mixed = run(base.model, batch)
        plain = run(base.model, batch)
        for row, name in enumerate(names):
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            with base.using(name):
                expected = run(base.model, alone)
            if family.name == "clip":  # its output compares every image with every text
                expected, got = expected[0, 0], mixed[row, row]
                assert abs(got - expected) / abs(expected) < EXACT, name
                continue
            assert off(mixed[row : row + 1], expected) < EXACT, name
            assert (off(mixed[row], plain[row]) > 1e-4) == (name is not None)


@pytest.mark.parametrize("family", [pytest.param(f.values[0], id=f.id, marks=f.marks) for f in EVERY if f.id != "clip"])
def test_gradients_of_a_mixed_batch_are_those_of_its_rows(family: Family) -> None:
    base, names = everything_attached(family)
    batch = batch_of(family, len(names))

    def gradients() -> dict[str, torch.Tensor]:
        found = {}
        for name, adapter in base.adapters.items():
            for key, p in adapter.named_parameters():
                found[f"{name}.{key}"] = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = None
        return found

    with base.rows(names):
        output = run(base.model, batch)
    output.square().sum().backward()
    mixed = gradients()
    for row, name in enumerate(names):
        if name is not None:
            with base.using(name):
                run(base.model, {key: value[row : row + 1] for key, value in batch.items()}).square().sum().backward()
    alone = gradients()
    for key, value in alone.items():
        assert (mixed[key] - value).abs().max() <= EXACT * max(1.0, value.abs().max()), key
    assert max(value.abs().max() for value in mixed.values()) > 1e-6


GENERATING = [pytest.param(f.values[0], id=f.id, marks=f.marks) for f in EVERY if f.values[0].generates]


@pytest.mark.parametrize("family", GENERATING)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_mixed_equals_alone(family: Family, beams: int) -> None:
    base, names = everything_attached(family)
    ids = batch_of(family, len(names))["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": beams}
    with base.rows(names):
        mixed = base.model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    for row, name in enumerate(names):
        with base.using(name):
            one = ids[row : row + 1]
            alone = base.model.generate(one, attention_mask=torch.ones_like(one), **options)  # type: ignore[operator]
        assert torch.equal(mixed[row : row + 1], alone), name


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_an_encoder_decoder_mixed_equals_alone(family: str, beams: int) -> None:
    """Generation calls the encoder by itself: what acted before must not act there."""
    base, names = everything_attached(FAMILIES[family])
    ids = batch_of(FAMILIES[family], len(names))["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": beams}
    plain = base.model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    with base.rows(names):
        mixed = base.model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    assert not torch.equal(mixed, plain)
    for row, name in enumerate(names):
        one = ids[row : row + 1]
        with base.using(name):
            alone = base.model.generate(one, attention_mask=torch.ones_like(one), **options)  # type: ignore[operator]
        assert torch.equal(mixed[row : row + 1], alone), name
    again = base.model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    assert torch.equal(again, plain)


def test_plain_rows_are_bitwise_those_of_a_plain_batch() -> None:
    """Kinds that act on rows leave the others alone."""
    family = FAMILIES["llama"]
    base, _ = everything_attached(family)
    names = [None, "lora0", None, "ia30", "houlsby1", None]
    batch = batch_of(family, len(names))
    with torch.no_grad():
        plain = run(base.model, batch)
        with base.rows(names):
            mixed = run(base.model, batch)
    assert all(torch.equal(mixed[row], plain[row]) == (name is None) for row, name in enumerate(names))


def test_nothing_is_left_behind_after_an_exception() -> None:
    family = FAMILIES["bert"]
    base, names = everything_attached(family)
    batch = batch_of(family, len(names))
    with torch.no_grad():
        plain = run(base.model, batch)
        with base.rows(names):
            before = run(base.model, batch)
        handle = base.model.get_submodule(base.sites[8].path).register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), base.rows(names):
            run(base.model, batch)
        handle.remove()
        assert torch.equal(run(base.model, batch), plain)
        with base.rows(names):
            assert torch.equal(run(base.model, batch), before)
        assert base.model.config._attn_implementation == "sdpa"


def test_what_cannot_be_mixed_says_so() -> None:
    class Shared(torch.nn.Module):
        """Uses a map once for all rows."""

        def __init__(self) -> None:
            super().__init__()
            self.place = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.place(torch.ones(1, 4))

    base = veneer.Base(Shared())
    base.attach(veneer.LoRA(rank=2), "a")
    with pytest.raises(AdapterError, match=r"a module sees a batch of 1. .*can't differ there"), base.rows(["a", None]):
        base.model(torch.ones(2, 4))


def test_what_replaces_the_whole_base_has_a_batch_of_its_own() -> None:
    family = FAMILIES["llama"]
    base, _ = everything_attached(family)
    adapter = base.attach(method("full"), "whole").double()
    perturb(adapter, std=0.2)
    with torch.no_grad():
        with base.rows(["whole", "whole"]):
            assert torch.equal(run(base.model, family.inputs), run(adapter, family.inputs))
        with pytest.raises(AdapterError, match="a batch of their own"), base.rows(["whole", "lora0"]):
            run(base.model, family.inputs)
        with pytest.raises(AdapterError, match="a batch of their own"), base.rows(["whole", None]):
            run(base.model, family.inputs)


def test_mistakes() -> None:
    family = FAMILIES["llama"]
    base, _ = everything_attached(family)
    with pytest.raises(UnknownName, match="No adapter 'nope'"), base.rows(["nope"]):
        pass
    for names in (["lora0", None, None], ["lora0"]):
        message = f"given for {len(names)} rows, but the batch has 2"
        with pytest.raises(AdapterError, match=message), base.rows(names):
            run(base.model, family.inputs)
    for wrong in ("ab", []):
        with pytest.raises(AdapterError, match="takes a list of names"), base.rows(wrong):
            pass
    with base.rows(["lora0", None]), pytest.raises(AdapterError, match="'lora0' is in use"):
        base.detach("lora0")


def test_a_table_looked_up_with_positions_first() -> None:
    """As many positions as rows, so that only the map of the model tells which axis is which."""
    base = veneer.Base(FAMILIES["xlnet"].model().requires_grad_(False))
    adapter = base.attach(veneer.LoRA(rank=2, targets="word_embedding"), "a").double()
    perturb(adapter, std=0.2)
    ids = IDS.flatten()[:9].view(3, 3)
    with torch.no_grad():
        plain = run(base.model, {"input_ids": ids})
        with base.rows(["a", None, "a"]):
            mixed = run(base.model, {"input_ids": ids})
        adapted = run(adapter, {"input_ids": ids})
    assert off(mixed[1], plain[1]) < EXACT
    assert off(mixed[[0, 2]], adapted[[0, 2]]) < EXACT
    assert off(adapted, plain) > 1e-3


@pytest.mark.parametrize(("family", "table"), [("t5", "shared"), ("deberta-v2", "rel_embeddings")])
def test_tables_that_others_read_are_no_sites(family: str, table: str) -> None:
    with pytest.raises(TargetError, match="matches nothing"):
        veneer.Base(FAMILIES[family].model()).attach(veneer.LoRA(rank=2, targets=table), "a")


def test_heads_of_another_width_than_the_bases() -> None:
    """Adapters with five labels each over a base with three, in one batch; not together with the plain base."""
    base = veneer.Base(tiny_bert().requires_grad_(False))
    for seed, name in enumerate(("a", "b")):
        head = {"classifier": {"weight": torch.randn(5, 32), "bias": torch.randn(5)}}
        perturb(base.attach(veneer.LoRA(rank=2), name, modules=head), seed=seed)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        with base.rows(["a", "b"]):
            mixed = base.model(input_ids=ids).logits
        alone = [base[name](input_ids=ids[row : row + 1]).logits for row, name in enumerate(("a", "b"))]
        assert mixed.shape == (2, 5)
        assert torch.allclose(mixed, torch.cat(alone), atol=1e-5)
        with base.rows(["a", None]), pytest.raises(AdapterError, match="numbers of outputs"):
            base.model(input_ids=ids)
