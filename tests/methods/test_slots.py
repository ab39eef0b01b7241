"""Virtual tokens that are copies of real ones, at slots in the text, give what the real ones there give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, MARKER, Family, run
from test_contract import ALWAYS, EXACT, off

import veneer
from veneer.errors import AdapterError, ConfigError
from veneer.methods import method_class

PTuning = method_class("ptuning")
LEADING, FIRST, SECOND = [25], [20, 21, 22], [23, 24]
WHOLE = LEADING + FIRST + SECOND
ROWS = [[5, 6, MARKER, 7, 8, MARKER, 9], [MARKER, 11, 12, 13, MARKER, MARKER, 14]]
"""The third marker of the second is one too many: a token like others."""
READING = [
    pytest.param(family, id=family.name, marks=() if family.name in ALWAYS else pytest.mark.slow)
    for family in FAMILIES.values()
    if "input_ids" in family.inputs and family.name not in ("clip", "plain")
]
GENERATING = [
    pytest.param(each.values[0], id=each.id, marks=each.marks) for each in READING if each.values[0].generates
]


def with_copies(family: Family) -> veneer.Adapter:
    """An adapter whose virtual tokens are embeddings of real ones."""
    base = veneer.Base(family.model().requires_grad_(False))
    adapter = base.attach(PTuning(length=6, slots=(3, 2), marker=MARKER, encoder=None), "a").double()
    embedding: Any = base.model.get_submodule(adapter.sites[0].path)
    with torch.no_grad():
        adapter.get_parameter("prompt_embeddings").copy_(embedding(torch.tensor(WHOLE)))
    return adapter


def spelt_out(row: list[int]) -> tuple[list[int], list[int]]:
    """A row with the real tokens, and where each of its own tokens, or the last in its place, stands there."""
    slots = iter([FIRST, SECOND])
    ids, places = list(LEADING), []
    for token in row:
        ids += next(slots, [token]) if token == MARKER else [token]
        places.append(len(ids) - 1)
    return ids, places


def alone(model: Any, family: Family, row: list[int]) -> torch.Tensor:
    """The base's output on a row spelt out."""
    ids, places = spelt_out(row)
    output = run(model, {**{key: value[:1] for key, value in family.inputs.items()}, "input_ids": torch.tensor([ids])})
    return output[0, places] if family.generates else output[0]


@pytest.mark.parametrize("family", READING)
def test_they_are_tokens_in_the_text(family: Family) -> None:
    adapter = with_copies(family)
    with torch.no_grad():
        adapted = run(adapter, {**family.inputs, "input_ids": torch.tensor(ROWS)})
        plain = run(adapter.base.model, {**family.inputs, "input_ids": torch.tensor(ROWS)})
        for index, row in enumerate(ROWS):
            one = (
                {**family.inputs, "decoder_input_ids": family.inputs["decoder_input_ids"][[index]]}
                if "decoder_input_ids" in family.inputs
                else {}
            )
            expected = alone(adapter.base.model, Family(family.name, family.make, one, family.generates), row)
            assert off(adapted[index], expected) < EXACT
            assert off(plain[index], expected) > 1e-3


@pytest.mark.parametrize("family", READING)
def test_padding_is_left_alone(family: Family) -> None:
    """Rows of unequal length, padded on the right, and on the left where the family can; in a mixed batch."""
    adapter = with_copies(family)
    base, short, other = adapter.base, [6, MARKER, 7, MARKER], [30, 31, 32]
    more = {key: value[:1].expand(3, -1) for key, value in family.inputs.items() if key != "input_ids"}
    sides = ("right", "left") if family.generates and family.name != "opt" else ("right",)
    sides = ("left",) if family.name == "xlnet" else sides  # classifies by its last position
    for side in sides:
        ids, mask = [], []
        for row in (ROWS[0], short, other):
            gap = len(ROWS[0]) - len(row)
            ids.append(row + [0] * gap if side == "right" else [0] * gap + row)
            mask.append([1] * len(row) + [0] * gap if side == "right" else [0] * gap + [1] * len(row))
        batch = {**more, "input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if side == "left" and family.generates:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), base.rows(["a", "a", None]):
            mixed = run(base.model, batch)
        with torch.no_grad():
            for index, row in enumerate((ROWS[0], short)):
                expected = alone(base.model, family, row)
                real = slice(0, len(row)) if side == "right" else slice(-len(row), None)
                assert off(mixed[index][real] if family.generates else mixed[index], expected) < EXACT
            one = {**{key: value[:1] for key, value in more.items()}, "input_ids": torch.tensor([other])}
            real = slice(0, len(other)) if side == "right" else slice(-len(other), None)
            assert off(mixed[2][real] if family.generates else mixed[2], run(base.model, one)[0]) < EXACT


@pytest.mark.parametrize("family", GENERATING)
def test_generation_goes_on_from_them(family: Family) -> None:
    adapter = with_copies(family)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    short = [6, MARKER, 7, MARKER]
    left = [[0] * 3 + short, ROWS[0]]
    batch = {"input_ids": torch.tensor(left), "attention_mask": torch.tensor([[0] * 3 + [1] * 4, [1] * 7])}
    got = adapter.generate(**batch, **options)[:, 7:]
    for index, row in enumerate((short, ROWS[0])):
        ids = torch.tensor([spelt_out(row)[0]])
        expected = adapter.base.model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
        assert torch.equal(got[index], expected[0, ids.shape[1] :])


def test_labels_and_token_types_follow() -> None:
    """The loss the model itself computes counts real tokens only; a slot belongs to the segment it is in."""
    adapter = with_copies(FAMILIES["llama"])
    ids = torch.tensor(ROWS[:1])
    labels = ids.masked_fill(ids == MARKER, -100)
    spelt, places = spelt_out(ROWS[0])
    there = torch.full((1, len(spelt)), -100)
    there[0, places] = labels[0]
    with torch.no_grad():
        expected = adapter.base.model(input_ids=torch.tensor([spelt]), labels=there).loss
        assert off(adapter(input_ids=ids, labels=labels).loss, expected) < 1e-6  # computed in float32
        assert off(adapter(input_ids=ids, labels=ids).loss, expected) < 1e-6  # at a slot there is nothing to learn

    adapter = with_copies(FAMILIES["bert"])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        expected = adapter.base.model(
            input_ids=torch.tensor([spelt]), token_type_ids=torch.tensor([[0] * 7 + [1] * 4])
        ).logits
        assert off(adapter(input_ids=ids, token_type_ids=types).logits, expected) < EXACT
        assert off(adapter(input_ids=ids).logits, expected) > 1e-6


def test_a_row_without_its_markers() -> None:
    adapter = with_copies(FAMILIES["llama"])
    with pytest.raises(AdapterError, match=r"Row 1 of the batch has 1 of the 2 markers \(token 50\)"):
        adapter(input_ids=torch.tensor([ROWS[0], [5, 6, MARKER, 7, 8, 9, 10]]))
    gap = torch.tensor([[1, 1, 1, 0, 1, 1, 1]])
    with pytest.raises(AdapterError, match="gaps in its attention_mask"):
        adapter(input_ids=torch.tensor(ROWS[:1]), attention_mask=gap)
    padding = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])  # a marker there is none
    with pytest.raises(AdapterError, match="1 of the 2 markers"):
        adapter(input_ids=torch.tensor(ROWS[:1]), attention_mask=padding)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": [3]}, "slots and marker go together"),
        ({"marker": "<mark>"}, "slots and marker go together"),
        ({"slots": [3, 2], "marker": 50, "length": 4}, "at most the length of 4 together"),
        ({"slots": [0], "marker": 50}, "numbers from 1"),
        ({"encoder": "gru"}, "method.encoder"),
        ({"width": 0}, "method.width"),
        ({"layers": 0}, "method.layers"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PTuning(**settings)


def test_markers_that_mark_nothing() -> None:
    base = veneer.Base(FAMILIES["llama"].model())
    for marker, message in ((99, "ids 0 to 98"), (0, "padded with"), ("<mark>", "needs a tokenizer")):
        with pytest.raises(AdapterError, match=message):
            base.attach(PTuning(slots=(3,), marker=marker))
    assert not base.adapters


def test_a_marker_of_a_real_tokenizer() -> None:
    base = veneer.load_base("minilm-l6")
    with pytest.raises(AdapterError, match=r"'\[P\]' is no special token of this base.* one of \[MASK\]\. Write it"):
        base.attach(PTuning(slots=(3,), marker="[P]"))
    adapter = base.attach(PTuning(length=4, slots=(3,), marker="[MASK]"), "a")
    batch = base.tokenizer(["The [MASK] film", "A [MASK]"], padding=True, return_tensors="pt")
    assert int(adapter.lower()[adapter.sites[0].path].marker) == base.tokenizer.mask_token_id
    assert adapter(**batch).last_hidden_state.shape[1] == batch["input_ids"].shape[1] + 3
